// Opens what shim/tensor_ops.h defines. Like Apple's header it needs Metal 4.
#pragma once
#if __METAL_VERSION__ < 400
#error "MetalPerformancePrimitives needs Metal 4"
#endif
namespace mpp {
namespace tensor_ops = ::msl_tensor_ops;
}
