// MLX's dense products in float32, through another BLAS. MLX's wheel for Linux is linked to the reference BLAS, whose
// loops run on one thread at about 2 GFLOP/s.
#pragma once

namespace mlx_marlin::cpu {

// cblas_sgemm with integers of 32 bits.
using Sgemm = void (*)(
    int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
    const float* b, int ldb, float beta, float* c, int ldc);

using Sgemv = void (*)(
    int order, int transpose, int m, int n, float alpha, const float* a, int lda, const float* x, int incx, float beta,
    float* y, int incy);

// Makes libmlx call these, which must work on the calling thread alone and be callable from many, with the parts of each
// product on the worker pool; one row goes to `sgemv`, as sgemm copies all of b first. Returns false where libmlx calls
// no cblas_sgemm of another library. For the rest of the process; call it while no product runs.
bool replace_sgemm(Sgemm sgemm, Sgemv sgemv);

// What libmlx calls from then on.
void parallel_sgemm(
    int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
    const float* b, int ldb, float beta, float* c, int ldc);

}  // namespace mlx_marlin::cpu
