#include "metal/encode.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "args.h"
#include "metal/shaders.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "plan/build_errors.h"
#include "plan/plan.h"

namespace mlx_marlin::metal {

namespace {

std::unordered_map<std::string, std::string>& shaders() {
  static std::unordered_map<std::string, std::string> sources;
  return sources;
}

struct FunctionConstant {
  const char* name;
  NS::UInteger index;
  bool is_bool;
};

#define MARLIN_ENTRY(index, type, name) {#name, index, std::string_view(#type) == "bool"},
constexpr FunctionConstant kFunctionConstants[] = {MARLIN_FUNCTION_CONSTANTS(MARLIN_ENTRY)};
#undef MARLIN_ENTRY

// The kernel with its constants: what names it to people, and in `pipelines`.
std::string specialised_name(const Dispatch& d) {
  std::string name = d.kernel;
  for (const Constant& c : d.constants) {
    name += " " + c.name + "=" + std::to_string(c.value);
  }
  return name;
}

std::string hex_hash(const std::string& text) {
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%016zx", std::hash<std::string>{}(text));
  return digits;
}

std::string library_source(const Dispatch& d) {
  const auto file = shaders().find(d.stem());
  if (file == shaders().end()) {
    throw std::runtime_error("there is no Metal source for it; reinstall mlx_marlin");
  }
  return d.library(file->second);
}

// Metal wants a value for every constant that a function mentions; those that a dispatch does not name are 0. MLX's
// caches know names only, so these hold hashes: of the library its text, of the pipeline all constants.
MTL::ComputePipelineState* build_pipeline(mx::metal::Device& device, const Dispatch& d, const std::string& name) {
  std::deque<bool> bools;  // a deque does not move its elements
  std::deque<uint32_t> words;
  mx::metal::MTLFCList constants;
  for (const FunctionConstant& entry : kFunctionConstants) {
    const uint32_t value = d.constant(entry.name);
    if (entry.is_bool) {
      constants.emplace_back(&bools.emplace_back(value != 0), MTL::DataTypeBool, entry.index);
    } else {
      constants.emplace_back(&words.emplace_back(value), MTL::DataTypeUInt, entry.index);
    }
  }
  try {
    const std::string text = library_source(d);
    const std::string host_name = d.host_name();
    MTL::Library* library =
        device.get_library("mlx_marlin_" + host_name + "_" + hex_hash(text), [&text] { return text; });
    return device.get_kernel(host_name, library, host_name + "_" + hex_hash(name + text), constants);
  } catch (const std::runtime_error& error) {
    // selection.selftest knows these words.
    throw std::runtime_error(
        "[mlx_marlin] the Metal kernel " + name + " could not be built: " + build_errors(error.what()));
  }
}

// Pipelines by specialised name, owned by MLX. MLX has one Metal device.
struct Pipelines {
  std::mutex mutex;
  std::unordered_map<std::string, MTL::ComputePipelineState*> by_name;

  MTL::ComputePipelineState* find(mx::metal::Device& device, const Dispatch& d) {
    const std::string name = specialised_name(d);
    const std::lock_guard lock(mutex);
    MTL::ComputePipelineState*& pipeline = by_name[name];
    if (pipeline == nullptr) {
      pipeline = build_pipeline(device, d, name);
    }
    const uint32_t threads = d.threads[0] * d.threads[1] * d.threads[2];
    if (threads > pipeline->maxTotalThreadsPerThreadgroup()) {
      // Metal would drop the dispatch in silence.
      throw std::runtime_error(
          "[mlx_marlin] this GPU runs " + name + " with at most " +
          std::to_string(pipeline->maxTotalThreadsPerThreadgroup()) + " threads, the config wants " +
          std::to_string(threads) + "; choose a config with fewer simdgroups.");
    }
    return pipeline;
  }
};

Pipelines& pipelines() {
  static Pipelines known;
  return known;
}

const char* variant_name(Variant variant) {
  static const char* names[] = {"decode", "prefill4", "base", "large_batch"};
  return names[static_cast<int>(variant)];
}

// Says which config a call asked for: nothing else does where the call was compiled, before anything could be tested.
std::runtime_error with_config(const std::runtime_error& error, const KernelConfig& c) {
  return std::runtime_error(
      std::string(error.what()) + "\nThe config was variant " + variant_name(c.variant) + ", tile " +
      std::to_string(c.tile_size_m) + " x " + std::to_string(c.tile_size_n) + ", simdgroups " +
      std::to_string(c.simdgroups) + ", fp32 accumulation " + (c.use_fp32_acc ? "on" : "off") +
      "; a layer's first call outside mx.compile looks for one that works.");
}

// The arrays that a call binds by name; scratch follows.
using Names = std::vector<std::string>;

void name_stack(Names& names, const std::string& name, const StackInfo& info) {
  static const char* parts[] = {".codes", ".offsets", ".formats", ".suh", ".svh", ".bias"};
  for (int i = 0; i < info.num_arrays(); ++i) {
    names.push_back(name + parts[i]);
  }
}

// A plan with its pipelines, and each binding's place among the call's arrays.
struct Prepared {
  Plan plan;
  std::vector<MTL::ComputePipelineState*> pipelines;
  std::vector<std::vector<size_t>> places;

  Prepared(Plan made, mx::Stream stream, Names names) : plan(std::move(made)) {
    for (const auto& [name, bytes] : plan.scratch) {
      names.push_back(name);
    }
    for (const Dispatch& d : plan.dispatches) {
      pipelines.push_back(metal::pipelines().find(mx::metal::device(stream.device), d));
      std::vector<size_t>& places_of = places.emplace_back();
      for (const Binding& b : d.buffers) {
        const auto found = std::find(names.begin(), names.end(), b.name);
        if (found == names.end()) {
          throw std::logic_error("[mlx_marlin] " + d.kernel + " binds " + b.name + ", which the call does not have.");
        }
        places_of.push_back(static_cast<size_t>(found - names.begin()));
      }
    }
  }
};

// What decides a plan.
template <class Call>
struct Key {
  Call call;
  int64_t rows;
  int top_k;
  int dtype;

  bool operator==(const Key&) const = default;
};

template <class Call>
struct KeyHash {
  size_t operator()(const Key<Call>& key) const {
    const KernelConfig& c = key.call.config;
    size_t hash = 0;
    // Calls that agree in all of these are rare, and compared in full.
    for (const int64_t part :
         {key.rows, int64_t(key.call.size()), int64_t(key.top_k), int64_t(key.dtype), int64_t(c.variant),
          int64_t(c.tile_size_n), int64_t(c.simdgroups)}) {
      hash = hash * 1000003 + std::hash<int64_t>{}(part);
    }
    return hash;
  }
};

// Planning and naming take longer than encoding: a layer in steady state does neither again.
template <class Call>
class PreparedCalls {
 public:
  template <class Make>
  std::shared_ptr<const Prepared> find(const Key<Call>& key, const Make& make) {
    {
      const std::lock_guard lock(mutex_);
      const auto known = prepared_.find(key);
      if (known != prepared_.end()) {
        return known->second;
      }
    }
    std::shared_ptr<const Prepared> made;
    try {
      made = std::make_shared<const Prepared>(make());
    } catch (const std::runtime_error& error) {
      throw with_config(error, key.call.config);
    }
    const std::lock_guard lock(mutex_);
    if (prepared_.size() >= kMost) {
      prepared_.clear();
    }
    prepared_[key] = made;
    return made;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    prepared_.clear();
  }

 private:
  static constexpr size_t kMost = 1024;  // a few KB each; a server meets ever new numbers of rows
  std::mutex mutex_;
  std::unordered_map<Key<Call>, std::shared_ptr<const Prepared>, KeyHash<Call>> prepared_;
};

template <class Call>
PreparedCalls<Call>& prepared_calls() {
  static PreparedCalls<Call> known;
  return known;
}

mx::array new_scratch(uint64_t bytes) {
  mx::array scratch({static_cast<mx::ShapeElem>((bytes + 3) / 4)}, mx::uint32, nullptr, {});
  scratch.set_data(mx::allocator::malloc(scratch.nbytes()));
  return scratch;
}

// Metal has no unaligned loads: what a view that begins elsewhere would give is undefined.
void require_aligned(const Prepared& prepared, const std::vector<mx::array>& arrays) {
  for (size_t i = 0; i < prepared.plan.dispatches.size(); ++i) {
    const std::vector<Binding>& buffers = prepared.plan.dispatches[i].buffers;
    for (size_t j = 0; j < buffers.size(); ++j) {
      const uint64_t begin = arrays[prepared.places[i][j]].offset() + buffers[j].offset;
      if (begin % buffers[j].alignment != 0) {
        throw std::invalid_argument(
            "[mlx_marlin] " + buffers[j].name + " begins at byte " + std::to_string(begin) +
            " of its buffer, but the kernels load " + std::to_string(buffers[j].alignment) +
            " bytes at a time; make it an array of its own, with mx.array(numpy.array(a)).");
      }
    }
  }
}

// The length stays set in an encoder that MLX shares: every dispatch sets its own, and the last leaves to whatever MLX
// encodes next, whose kernels have static memory, the least there is.
constexpr uint32_t kLeastThreadgroupBytes = 16;

// arrays, then scratch: in the order of the names that the plan was prepared with.
void encode(
    const Prepared& prepared, mx::Stream stream, std::vector<mx::array> arrays, const std::vector<mx::array>& scratch) {
  mx::metal::CommandEncoder& encoder = mx::metal::get_command_encoder(stream);
  for (const mx::array& array : scratch) {
    encoder.add_temporary(array);
    arrays.push_back(array);
  }
  require_aligned(prepared, arrays);
  for (size_t i = 0; i < prepared.plan.dispatches.size(); ++i) {
    const Dispatch& d = prepared.plan.dispatches[i];
    encoder.set_compute_pipeline_state(prepared.pipelines[i]);
    encoder.set_bytes(d.args.data(), static_cast<int>(d.args.size()), 0);
    for (size_t j = 0; j < d.buffers.size(); ++j) {
      const Binding& b = d.buffers[j];
      mx::array& array = arrays[prepared.places[i][j]];
      const auto offset = static_cast<int64_t>(b.offset);
      if (b.access == Access::read) {
        encoder.set_input_array(array, b.slot, offset);
      } else {
        encoder.set_output_array(array, b.slot, offset);
      }
    }
    encoder.set_threadgroup_memory_length(std::max(d.threadgroup_bytes, kLeastThreadgroupBytes), 0);
    encoder.dispatch_threadgroups(
        MTL::Size(d.grid[0], d.grid[1], d.grid[2]), MTL::Size(d.threads[0], d.threads[1], d.threads[2]));
  }
  encoder.set_threadgroup_memory_length(kLeastThreadgroupBytes, 0);
}

// MLX ends a command buffer when the arrays bound in it have more than 40 to 50 Mi elements, by the chip: less than the
// codes of one large layer, of which a call may read a few experts. It is shown what is read at most. The memory is the
// same, so that hazards are seen as ever.
mx::array as_read(const mx::array& codes, int64_t slots, int experts) {
  const auto read = static_cast<size_t>(std::min<int64_t>(slots, experts));
  mx::array view(codes.shape(), codes.dtype(), nullptr, {});
  view.copy_shared_buffer(codes, codes.strides(), codes.flags(), codes.data_size() / experts * read);
  return view;
}

// Scratch comes before the output has memory and the first dispatch is encoded. arrays: the inputs.
void run(const Prepared& prepared, mx::Stream stream, std::vector<mx::array> arrays, mx::array& out) {
  std::vector<mx::array> scratch;
  for (const auto& [name, bytes] : prepared.plan.scratch) {
    scratch.push_back(new_scratch(bytes));
  }
  out.set_data(mx::allocator::malloc(out.nbytes()));
  arrays.push_back(out);
  encode(prepared, stream, std::move(arrays), scratch);
}

int dtype_id(mx::Dtype dtype) {
  return dtype == mx::float32 ? MARLIN_DTYPE_FLOAT32
      : dtype == mx::float16  ? MARLIN_DTYPE_FLOAT16
                              : MARLIN_DTYPE_BFLOAT16;
}

}  // namespace

void set_shaders(std::unordered_map<std::string, std::string> sources) {
  {
    const std::lock_guard lock(pipelines().mutex);
    shaders() = std::move(sources);
    pipelines().by_name.clear();
  }
  prepared_calls<LinearCall>().clear();
  prepared_calls<SwigluCall>().clear();
}

void encode_linear(const LinearCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  const auto rows = static_cast<int64_t>(inputs[0].size()) / call.x_size();
  const int dtype = dtype_id(out.dtype());
  const auto prepared = prepared_calls<LinearCall>().find({call, rows, 1, dtype}, [&] {
    Names names = {"x"};
    name_stack(names, "weight", call.stack);
    if (call.gathered) {
      names.push_back("indices");
    }
    names.push_back("y");
    return Prepared(plan_linear(call, rows, dtype), stream, std::move(names));
  });
  std::vector<mx::array> arrays = inputs;
  if (call.gathered) {
    arrays[1] = as_read(inputs[1], static_cast<int64_t>(inputs.back().size()), call.stack.experts);
  }
  run(*prepared, stream, std::move(arrays), out);
}

void encode_swiglu(const SwigluCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  const auto rows = static_cast<int64_t>(inputs[0].size()) / call.hidden;
  const int top_k = inputs[1].shape(-1);
  const int dtype = dtype_id(out.dtype());
  const auto prepared = prepared_calls<SwigluCall>().find({call, rows, top_k, dtype}, [&] {
    Names names = {"x", "indices"};
    call.each_stack([&](const char* name, const StackInfo& stack) { name_stack(names, name, stack); });
    if (call.combine) {
      names.push_back("scores");
    }
    names.push_back("y");
    return Prepared(plan_swiglu(call, rows, top_k, dtype), stream, std::move(names));
  });
  std::vector<mx::array> arrays = inputs;
  const auto slots = static_cast<int64_t>(inputs[1].size());
  size_t codes = 2;
  call.each_stack([&](const char*, const StackInfo& stack) {
    arrays[codes] = as_read(inputs[codes], slots, stack.experts);
    codes += static_cast<size_t>(stack.num_arrays());
  });
  run(*prepared, stream, std::move(arrays), out);
}

void encode_decode(const DecodeCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  Names names;
  name_stack(names, "weight", call.stack);
  names.push_back("y");
  // Not kept: decoding a whole matrix is no steady state.
  run(Prepared(plan_decode(call), stream, std::move(names)), stream, inputs, out);
}

void encode_embedding(
    const EmbeddingCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  const auto rows = static_cast<int64_t>(inputs[0].size());
  // A call reads a row for each id, not the table (see as_read).
  std::vector<mx::array> arrays = inputs;
  arrays[1] = as_read(inputs[1], rows, call.rows);
  // Not kept: a plan of one dispatch, made once per token.
  Prepared prepared(
      plan_embedding(call, rows, dtype_id(out.dtype())), stream,
      {"indices", "embedding.codes", "embedding.signs", "y"});
  run(prepared, stream, std::move(arrays), out);
}

void encode_viterbi(const ViterbiCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  // Not kept: a search takes milliseconds.
  const auto tiles = static_cast<int64_t>(inputs[0].shape(0));
  run(Prepared(plan_viterbi(call, tiles), stream, {"tiles", "values", "y"}), stream, inputs, out);
}

}  // namespace mlx_marlin::metal
