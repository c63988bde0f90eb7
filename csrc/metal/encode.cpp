#include "metal/encode.h"

#include <algorithm>
#include <cctype>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#include "args.h"
#include "metal/shaders.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "plan.h"

namespace mlx_marlin::metal {

namespace {

using Arrays = std::unordered_map<std::string, mx::array>;

std::unordered_map<std::string, std::string>& shaders() {
  static std::unordered_map<std::string, std::string> sources;
  return sources;
}

// Pipelines by specialised name, owned by MLX: a layer in steady state neither hashes sources nor
// builds constants. MLX has one Metal device.
struct Pipelines {
  std::mutex mutex;
  std::unordered_map<std::string, MTL::ComputePipelineState*> by_name;
};

Pipelines& pipelines() {
  static Pipelines known;
  return known;
}

struct FunctionConstant {
  const char* name;
  NS::UInteger index;
  bool is_bool;
};

#define MARLIN_ENTRY(index, type, name) {#name, index, std::string_view(#type) == "bool"},
constexpr FunctionConstant kFunctionConstants[] = {MARLIN_FUNCTION_CONSTANTS(MARLIN_ENTRY)};
#undef MARLIN_ENTRY

// The kernel with its constants, unique: MLX's cache of pipelines knows no more than this.
std::string specialised_name(const Dispatch& d) {
  std::string name = d.kernel;
  for (const Constant& c : d.constants) {
    name += " " + c.name + "=" + std::to_string(c.value);
  }
  return name;
}

// The kernel's name inside its library: an identifier.
std::string host_name(const Dispatch& d) {
  std::string name;
  for (const char c : d.kernel) {
    if (c != ' ') {
      name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
    }
  }
  return name;
}

// MLX's cache of libraries knows the name only, so it holds the source's hash.
MTL::Library* find_library(mx::metal::Device& device, const Dispatch& d) {
  const auto source = shaders().find(d.stem());
  if (source == shaders().end()) {
    throw std::runtime_error("there is no Metal source for it; reinstall mlx_marlin");
  }
  const std::string& text = source->second;
  const std::string name = "mlx_marlin " + d.kernel + " " + std::to_string(std::hash<std::string>{}(text));
  return device.get_library(name, [&text, &d] {
    if (d.kernel.find('<') == std::string::npos) {
      return text;
    }
    return text + "\ntemplate [[host_name(\"" + host_name(d) + "\")]] [[kernel]] decltype(" + d.kernel + ") " +
        d.kernel + ";\n";
  });
}

// Metal wants a value for every constant that a function mentions; those that a dispatch does not name
// are 0.
MTL::ComputePipelineState* build_kernel(mx::metal::Device& device, const Dispatch& d, const std::string& name) {
  static constexpr uint32_t zero = 0;
  std::deque<bool> bools;  // a deque does not move its elements
  mx::metal::MTLFCList constants;
  for (const FunctionConstant& entry : kFunctionConstants) {
    const auto named = std::find_if(
        d.constants.begin(), d.constants.end(), [&entry](const Constant& c) { return c.name == entry.name; });
    const uint32_t& value = named == d.constants.end() ? zero : named->value;
    if (entry.is_bool) {
      constants.emplace_back(&bools.emplace_back(value != 0), MTL::DataTypeBool, entry.index);
    } else {
      constants.emplace_back(&value, MTL::DataTypeUInt, entry.index);
    }
  }
  try {
    return device.get_kernel(host_name(d), find_library(device, d), name, constants);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("[mlx_marlin] the Metal kernel " + name + " could not be built: " + error.what());
  }
}

MTL::ComputePipelineState* find_kernel(mx::metal::Device& device, const Dispatch& d) {
  const std::string name = specialised_name(d);
  const std::lock_guard lock(pipelines().mutex);
  MTL::ComputePipelineState*& kernel = pipelines().by_name[name];
  if (kernel == nullptr) {
    kernel = build_kernel(device, d, name);
  }
  return kernel;
}

mx::array new_scratch(uint64_t bytes) {
  mx::array scratch({static_cast<mx::ShapeElem>((bytes + 3) / 4)}, mx::uint32, nullptr, {});
  scratch.set_data(mx::allocator::malloc(scratch.nbytes()));
  return scratch;
}

void encode(const Plan& plan, mx::Stream stream, Arrays arrays) {
  mx::metal::Device& device = mx::metal::device(stream.device);
  mx::metal::CommandEncoder& encoder = mx::metal::get_command_encoder(stream);
  for (const auto& [name, bytes] : plan.scratch) {
    const mx::array scratch = new_scratch(bytes);
    arrays.emplace(name, scratch);
    encoder.add_temporary(scratch);
  }
  for (const Dispatch& d : plan.dispatches) {
    MTL::ComputePipelineState* kernel = find_kernel(device, d);
    const uint32_t threads = d.threads[0] * d.threads[1] * d.threads[2];
    if (threads > kernel->maxTotalThreadsPerThreadgroup()) {
      // Metal would drop the dispatch in silence.
      throw std::runtime_error(
          "[mlx_marlin] this GPU runs " + specialised_name(d) + " with at most " +
          std::to_string(kernel->maxTotalThreadsPerThreadgroup()) + " threads, the config wants " +
          std::to_string(threads) + "; choose a config with fewer simdgroups.");
    }
    encoder.set_compute_pipeline_state(kernel);
    encoder.set_bytes(d.args.data(), static_cast<int>(d.args.size()), 0);
    for (const Binding& b : d.buffers) {
      mx::array& array = arrays.at(b.name);
      const auto offset = static_cast<int64_t>(b.offset);
      if (b.access == Access::read) {
        encoder.set_input_array(array, b.slot, offset);
      } else {
        encoder.set_output_array(array, b.slot, offset);
      }
    }
    if (d.threadgroup_bytes > 0) {
      encoder.set_threadgroup_memory_length(d.threadgroup_bytes, 0);
    }
    encoder.dispatch_threadgroups(
        MTL::Size(d.grid[0], d.grid[1], d.grid[2]), MTL::Size(d.threads[0], d.threads[1], d.threads[2]));
  }
}

// Binds a stack's arrays, which begin at inputs[first]; returns where the next begins.
size_t bind_stack(
    Arrays& arrays, const std::string& name, const StackInfo& info, const std::vector<mx::array>& inputs,
    size_t first) {
  static const char* parts[] = {".codes", ".offsets", ".formats", ".suh", ".svh", ".bias"};
  const size_t count = static_cast<size_t>(info.num_arrays());
  for (size_t i = 0; i < count; ++i) {
    arrays.emplace(name + parts[i], inputs[first + i]);
  }
  return first + count;
}

int dtype_id(mx::Dtype dtype) {
  return dtype == mx::float32 ? MARLIN_DTYPE_FLOAT32
      : dtype == mx::float16  ? MARLIN_DTYPE_FLOAT16
                              : MARLIN_DTYPE_BFLOAT16;
}

}  // namespace

void set_shaders(std::unordered_map<std::string, std::string> sources) {
  const std::lock_guard lock(pipelines().mutex);
  shaders() = std::move(sources);
  pipelines().by_name.clear();
}

void encode_linear(const LinearCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  Arrays arrays;
  arrays.emplace("x", inputs[0]);
  arrays.emplace("y", out);
  const size_t next = bind_stack(arrays, "weight", call.stack, inputs, 1);
  if (call.gathered) {
    arrays.emplace("indices", inputs[next]);
  }
  const auto rows = static_cast<int64_t>(inputs[0].size()) / call.x_size();
  encode(plan_linear(call, rows, dtype_id(out.dtype())), stream, std::move(arrays));
}

void encode_swiglu(const SwigluCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  Arrays arrays;
  arrays.emplace("x", inputs[0]);
  arrays.emplace("indices", inputs[1]);
  arrays.emplace("y", out);
  size_t next = bind_stack(arrays, "gate", call.gate, inputs, 2);
  next = bind_stack(arrays, "up", call.up, inputs, next);
  next = bind_stack(arrays, "down", call.down, inputs, next);
  if (call.combine) {
    arrays.emplace("scores", inputs[next]);
  }
  const auto rows = static_cast<int64_t>(inputs[0].size()) / call.hidden;
  const int top_k = inputs[1].shape(-1);
  encode(plan_swiglu(call, rows, top_k, dtype_id(out.dtype())), stream, std::move(arrays));
}

void encode_decode(const DecodeCall& call, mx::Stream stream, const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()));
  Arrays arrays;
  arrays.emplace("y", out);
  bind_stack(arrays, "weight", call.stack, inputs, 0);
  encode(plan_decode(call), stream, std::move(arrays));
}

}  // namespace mlx_marlin::metal
