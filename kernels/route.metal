// Groups slots by expert without atomics and without the host: a stable counting sort in one threadgroup.
// Bucket `experts` holds the slots whose index is out of range.
#include "common.h"

// Slots that a scanner looks at before it needs the first of their indices: a load takes some 100 cycles on one core.
static constant constexpr const uint kAhead = 8;

// Calls found(slot) for each slot of a part whose bucket is `bucket`.
template <typename Found>
METAL_FUNC void scan(device const uint* indices, uint begin, uint end, uint experts, uint bucket, thread Found& found) {
  uint slot = begin;
  for (; slot + kAhead <= end; slot += kAhead) {
    uint ahead[kAhead];
    MARLIN_UNROLL
    for (uint i = 0; i < kAhead; ++i) {
      ahead[i] = min(indices[slot + i], experts);
    }
    MARLIN_UNROLL
    for (uint i = 0; i < kAhead; ++i) {
      if (ahead[i] == bucket) {
        found.add(slot + i);
      }
    }
  }
  for (; slot < end; ++slot) {
    if (min(indices[slot], experts) == bucket) {
      found.add(slot);
    }
  }
}

struct CountSlots {
  uint count;

  METAL_FUNC void add(uint) thread {
    ++count;
  }
};

struct PlaceSlots {
  device uint* order;
  uint position;

  METAL_FUNC void add(uint slot) thread {
    order[position] = slot;
    ++position;
  }
};

// Several threads ("scanners") count one expert's slots, each in its own part of the slots.
[[kernel, max_total_threads_per_threadgroup(MARLIN_SOURCE_max_threads)]] void trellis_route(
    constant MarlinRouteArgs& args [[buffer(0)]],
    device const uint* indices [[buffer(1)]],
    device uint* order [[buffer(2)]],
    device MarlinRowTile* tiles [[buffer(3)]],
    threadgroup uint* counts [[threadgroup(0)]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]]) {
  const uint buckets = args.experts + 1;
  const uint tasks = buckets * args.scanners;
  const uint part = (args.slots + args.scanners - 1) / args.scanners;
  // counts[bucket * scanners + scanner], then per bucket: slots, first position, first tile; number of tiles.
  threadgroup uint* sizes = counts + tasks;
  threadgroup uint* firsts = sizes + buckets;
  threadgroup uint* first_tiles = firsts + buckets;

  for (uint task = thread_index; task < tasks; task += threads) {
    const uint bucket = task / args.scanners;
    const uint begin = min(task % args.scanners * part, args.slots);
    const uint end = min(begin + part, args.slots);
    CountSlots found = {0};
    scan(indices, begin, end, args.experts, bucket, found);
    counts[task] = found.count;
  }
  for (uint i = thread_index; i < args.positions; i += threads) {
    order[i] = ~0u;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);

  for (uint bucket = thread_index; bucket < buckets; bucket += threads) {
    uint size = 0;
    for (uint scanner = 0; scanner < args.scanners; ++scanner) {
      const uint count = counts[bucket * args.scanners + scanner];
      counts[bucket * args.scanners + scanner] = size;
      size += count;
    }
    sizes[bucket] = size;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (thread_index == 0) {
    uint position = 0;
    uint tile = 0;
    for (uint bucket = 0; bucket < buckets; ++bucket) {
      firsts[bucket] = position;
      first_tiles[bucket] = tile;
      tile += (sizes[bucket] + args.tile_rows - 1) / args.tile_rows;
      position += (sizes[bucket] + args.alignment - 1) / args.alignment * args.alignment;
    }
    first_tiles[buckets] = tile;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint bucket = thread_index; bucket < buckets; bucket += threads) {
    for (uint i = first_tiles[bucket]; i < first_tiles[bucket + 1]; ++i) {
      const uint done = (i - first_tiles[bucket]) * args.tile_rows;
      tiles[i].expert = bucket;
      tiles[i].first = firsts[bucket] + done;
      tiles[i].count = min(sizes[bucket] - done, args.tile_rows);
    }
  }
  for (uint i = first_tiles[buckets] + thread_index; i < args.tiles; i += threads) {
    tiles[i].expert = 0;
    tiles[i].first = 0;
    tiles[i].count = 0;
  }
  for (uint task = thread_index; task < tasks; task += threads) {
    const uint bucket = task / args.scanners;
    const uint scanner = task % args.scanners;
    const uint before = counts[task];
    const uint after = scanner + 1 < args.scanners ? counts[task + 1] : sizes[bucket];
    if (before != after) {
      const uint begin = min(scanner * part, args.slots);
      PlaceSlots found = {order, firsts[bucket] + before};
      scan(indices, begin, min(begin + part, args.slots), args.experts, bucket, found);
    }
  }
}
