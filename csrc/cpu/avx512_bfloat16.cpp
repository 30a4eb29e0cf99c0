// The kernels for AVX-512 with products of bfloat16 in vectors.
#include "kernels.h"

// behind what other files share: their inline functions must run on any machine
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include <immintrin.h>

namespace svf {
namespace {
#include "vector_avx512.h"
#include "gemm.h"
#include "bfloat16_vector.h"
#include "instruction_set.h"
}  // namespace
const Kernels& avx512_bfloat16_kernels() { return table("avx512_bfloat16"); }
}  // namespace svf
