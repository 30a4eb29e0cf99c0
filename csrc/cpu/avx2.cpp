// The kernels for AVX2 and FMA; bfloat16 is computed in single precision.
#include "kernels.h"

// behind what other files share: their inline functions must run on any machine
#pragma GCC target("avx2,fma")
#include <immintrin.h>

namespace svf {
namespace {
#include "vector_avx2.h"
#include "gemm.h"
using Half = Single;
#include "instruction_set.h"
}  // namespace
const Kernels& avx2_kernels() { return table("avx2"); }
}  // namespace svf
