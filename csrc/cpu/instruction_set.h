// All kernels of one instruction set and their table. Included last by the file that names the set, behind its vectors, the products
// (gemm.h) and what multiplies bfloat16 (`Half`).
#include "pack.h"
#include "rows.h"
#include "kept_z.h"
#include "masks.h"
#include "tile.h"
#include "winograd.h"
#include "forward.h"
#include "backward.h"
#include "cosine.h"

inline const Kernels& table(const char* name) {
  static const Kernels kernels{
      name,
      [](const Matrix& m, bool half) { return half ? packed_bytes<Half>(m) : packed_bytes<Single>(m); },
      [](const Matrix& m, bool half, void* out, const Threads& threads) {
        half ? pack<Half>(m, out, threads) : pack<Single>(m, out, threads);
      },
      [](const Forward& f, const Threads& threads) {
        f.type == Type::kFloat ? forward_of<Single, float>(f, threads) : forward_of<Half, uint16_t>(f, threads);
      },
      [](const Backward& b, const Threads& threads) {
        if (b.type == Type::kFloat)
          b.z_type == Type::kInt8 ? backward_of<Single, float, int8_t>(b, threads)
                                  : backward_of<Single, float, float>(b, threads);
        else
          b.z_type == Type::kInt8 ? backward_of<Half, uint16_t, int8_t>(b, threads)
                                  : backward_of<Half, uint16_t, uint16_t>(b, threads);
      },
      [](const DataGradient& d, const Threads& threads) {
        d.type == Type::kFloat ? data_gradient_of<Single, float>(d, threads) : data_gradient_of<Half, uint16_t>(d, threads);
      },
      max_cosine_of,
      [](const Quantize& q, const Threads& threads) {
        q.type == Type::kFloat ? quantize_of<float>(q, threads) : quantize_of<uint16_t>(q, threads);
      },
      [](const Masked& m, const Threads& threads) {
        m.type == Type::kFloat ? pack_mask_of<float>(m, threads) : pack_mask_of<uint16_t>(m, threads);
      },
      [](const Masked& m, const Threads& threads) {
        m.type == Type::kFloat ? keep_masked_of<float>(m, threads) : keep_masked_of<uint16_t>(m, threads);
      },
      Half::kElements > 1,
  };
  return kernels;
}
