// The kernels for AVX-512; bfloat16 is computed in single precision.
#include "kernels.h"

// behind what other files share: their inline functions must run on any machine
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include <immintrin.h>

namespace svf {
namespace {
#include "vector_avx512.h"
#include "gemm.h"
using Half = Single;
#include "instruction_set.h"
}  // namespace
const Kernels& avx512_kernels() { return table("avx512"); }
}  // namespace svf
