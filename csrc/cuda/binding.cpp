// The CUDA kernels as ops of torch, through its stable ABI: tensors to plain structs, checks, the device and its current stream.
//
// With SVF_FAST_EMULATION the same ops run the same kernels on the host, compiled for the emulator of the tests.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "launch.h"

#ifdef SVF_FAST_EMULATION
#include "emulation.h"
#endif

#ifndef SVF_FAST_EMULATION
// A CPU build of torch has no such symbol, and still has to load this file.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace {

using namespace svf::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The device and stream that an op runs on: those of its first tensor.
class Stream {
 public:
#ifdef SVF_FAST_EMULATION
  explicit Stream(const Tensor&) {}
#else
  explicit Stream(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
    const AOTITorchError status = aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_);
    STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "the current CUDA stream could not be read");
  }
#endif

  operator cudaStream_t() const { return static_cast<cudaStream_t>(stream_); }

 private:
#ifndef SVF_FAST_EMULATION
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

void check(cudaError_t status, const char* kernel) {
#ifdef SVF_FAST_EMULATION
  emulation::forbid_all();
#endif
  STD_TORCH_CHECK(status == cudaSuccess, "the CUDA kernel ", kernel, " could not be launched: ", cudaGetErrorString(status));
}

// The address of a tensor's first element, on the device of the op's Stream. The emulator lets kernels touch what lies between its first
// and its last.
void* data(const Tensor& t) {
#ifndef SVF_FAST_EMULATION
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex(),
                  "all tensors of a call must be on one CUDA device");
#else
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    last += (t.size(i) - 1) * t.stride(i);
  }
  emulation::allow(t.data_ptr(), t.numel() == 0 ? 0 : (last + 1) * static_cast<int64_t>(t.element_size()));
#endif
  return t.data_ptr();
}

void* data(const MaybeTensor& t) { return t ? data(*t) : nullptr; }

// Whether elements follow each other without gaps, dimensions in this order from the outermost on.
bool is_dense(const Tensor& t, std::initializer_list<int64_t> order) {
  int64_t expected = t.numel();
  for (const int64_t i : order) {
    expected = t.numel() == 0 ? 0 : expected / t.size(i);
    if (t.numel() != 0 && t.size(i) != 1 && t.stride(i) != expected) {
      return false;
    }
  }
  return true;
}

// A dense [N, C, H, W] with adjacent channels.
bool is_channels_last(const Tensor& t) { return t.dim() == 4 && is_dense(t, {0, 2, 3, 1}); }

// The address of a tensor that is dense in either memory format.
void* whole(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() || is_channels_last(t), name, " must be dense");
  return data(t);
}

// Activations [N, C, H, W] as the products' kernels read and write them.
void* rows(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  STD_TORCH_CHECK(is_channels_last(t) && t.scalar_type() == type && t.numel() == count, name, " must be a dense [N, C, H, W] of ", count,
                  " elements of type ", toString(type), " with adjacent channels");
  return data(t);
}

void* rows(const MaybeTensor& t, ScalarType type, int64_t count, const char* name) { return t ? rows(*t, type, count, name) : nullptr; }

// A dense tensor of one type and size, or null.
template <class T>
T* dense(const MaybeTensor& t, ScalarType type, int64_t count, const char* name) {
  if (!t) {
    return nullptr;
  }
  STD_TORCH_CHECK(t->scalar_type() == type && t->numel() == count, name, " must have ", count, " elements of type ", toString(type),
                  ", got ", t->numel(), " of type ", toString(t->scalar_type()));
  return static_cast<T*>(whole(*t, name));
}

float* floats(const MaybeTensor& t, int64_t count, const char* name) { return dense<float>(t, ScalarType::Float, count, name); }

// [N, C, H, W] whose channels are adjacent, of `like`'s type, pictures and pixels.
Picture picture(const MaybeTensor& t, const Tensor& like, int64_t channels, const char* name) {
  if (!t) {
    return {};
  }
  STD_TORCH_CHECK(t->dim() == 4 && (channels == 1 || t->stride(1) == 1), name, " must be [N, C, H, W] with adjacent channels");
  STD_TORCH_CHECK(t->scalar_type() == like.scalar_type() && t->size(0) == like.size(0) && t->size(1) == channels &&
                      t->size(2) == like.size(2) && t->size(3) == like.size(3),
                  name, " must be of the type and size of what it goes with, with ", channels, " channels");
  const auto stride = [&](int64_t i) { return t->size(i) == 1 ? 0 : t->stride(i); };
  return {data(t), stride(0), stride(2), stride(3)};
}

// `columns` a row.
Matrix matrix(const Tensor& t, const Tensor& like, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == like.scalar_type(), name, " must be dense and of the activations' type");
  STD_TORCH_CHECK(t.numel() == t.size(0) * columns, name, " must have ", columns, " columns");
  return {data(t), static_cast<int32_t>(t.size(0)), static_cast<int32_t>(columns)};
}

Extent extent_of(const Tensor& t) {
  const int64_t plane = t.size(2) * t.size(3), pixels = t.size(0) * plane;
  STD_TORCH_CHECK(pixels > 0 && pixels < (int64_t{1} << 31) - 4096, "pixels are numbered in 32 bits, got ", pixels);
  return {static_cast<int32_t>(pixels), static_cast<int32_t>(plane), static_cast<int32_t>(t.size(3))};
}

Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kFloat16;
    case ScalarType::Float: return Element::kFloat32;
    default: STD_TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16");
  }
}

Epilogue epilogue_of(const Tensor& y, const MaybeTensor& scale, const MaybeTensor& shift, const Picture& residual,
                     const MaybeTensor& mask, bool relu) {
  const int64_t channels = y.size(1);
  return {floats(scale, channels, "scale"),
          floats(shift, channels, "shift"),
          residual,
          whole(y, "y"),
          dense<uint8_t>(mask, ScalarType::Byte, (y.numel() + 7) / 8, "mask"),
          static_cast<int32_t>(channels),
          relu};
}

// z of type `type`, or int8 and its scales.
KeptZ kept_of(const MaybeTensor& z, const MaybeTensor& q, const MaybeTensor& q_scale, ScalarType type, int64_t pixels, int64_t rank) {
  STD_TORCH_CHECK(!q == !q_scale, "q and q_scale go together");
  return {rows(z, type, pixels * rank, "z"), static_cast<int8_t*>(rows(q, ScalarType::Char, pixels * rank, "q")),
          floats(q_scale, (pixels + 63) / 64 * rank, "q_scale")};
}

// Masks of products are written by whole bytes.
void check_mask(const MaybeTensor& mask, int64_t channels) {
  STD_TORCH_CHECK(!mask || channels % 8 == 0, "a mask is written beside channels in multiples of 8, got ", channels);
}

void project(const Tensor& z, const Tensor& left, const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& residual,
             const Tensor& y, const MaybeTensor& mask, const MaybeTensor& q, const MaybeTensor& q_scale, bool relu, int64_t products,
             int64_t tile) {
  const Stream stream(z);
  const Extent extent = extent_of(y);
  check_mask(mask, y.size(1));
  const int64_t rank = z.size(1);
  STD_TORCH_CHECK(left.size(0) == y.size(1), "left must have a row for each channel of y");
  rows(y, z.scalar_type(), y.numel(), "y");
  const ProjectForward p{extent, rows(z, z.scalar_type(), extent.pixels * rank, "z"), matrix(left, z, rank, "left"),
                         epilogue_of(y, scale, shift, picture(residual, y, y.size(1), "the residual"), mask, relu),
                         kept_of(std::nullopt, q, q_scale, z.scalar_type(), extent.pixels, rank)};
  check(project_forward(p, static_cast<Products>(products), tile, stream), "project");
}

Gradient gradient_of(const Tensor& dy, const MaybeTensor& mask, const Tensor& u, const MaybeTensor& scale, const MaybeTensor& s,
                     const MaybeTensor& z, const MaybeTensor& q, const MaybeTensor& q_scale, const MaybeTensor& d,
                     const MaybeTensor& partial, int64_t tile) {
  const Extent extent = extent_of(dy);
  const int64_t rank = u.size(1), tiles = (extent.pixels + tile - 1) / tile;
  STD_TORCH_CHECK(u.size(0) == dy.size(1), "u must have a row for each channel of dy");
  return {extent,
          picture(dy, dy, dy.size(1), "dy"),
          dense<uint8_t>(mask, ScalarType::Byte, (dy.numel() + 7) / 8, "mask"),
          floats(scale, dy.size(1), "scale"),
          matrix(u, dy, rank, "u"),
          rows(d, dy.scalar_type(), dy.numel(), "d"),
          kept_of(z, q, q_scale, dy.scalar_type(), extent.pixels, rank),
          floats(partial, tiles * rank, "partial"),
          floats(s, rank, "s")};
}

void project_backward_op(const Tensor& dy, const MaybeTensor& mask, const Tensor& u, const MaybeTensor& scale, const MaybeTensor& s,
                         const MaybeTensor& z, const MaybeTensor& q, const MaybeTensor& q_scale, const MaybeTensor& d,
                         const MaybeTensor& partial, const MaybeTensor& weighted, int64_t products, int64_t tile) {
  const Stream stream(dy);
  const ProjectBackward p{gradient_of(dy, mask, u, scale, s, z, q, q_scale, d, partial, tile),
                          rows(weighted, dy.scalar_type(), dy.numel() / dy.size(1) * u.size(1), "weighted")};
  check(project_backward(p, static_cast<Products>(products), tile, stream), "project_backward");
}

void back_to_back(const Tensor& x, const Tensor& v, const MaybeTensor& s, const Tensor& u, const MaybeTensor& scale,
                  const MaybeTensor& shift, const MaybeTensor& residual, const Tensor& y, const MaybeTensor& mask, const MaybeTensor& z,
                  const MaybeTensor& q, const MaybeTensor& q_scale, bool relu, int64_t products, int64_t tile) {
  const Stream stream(x);
  const Extent extent = extent_of(y);
  check_mask(mask, y.size(1));
  STD_TORCH_CHECK(u.size(0) == y.size(1), "u must have a row for each channel of y");
  rows(y, x.scalar_type(), y.numel(), "y");
  const BackToBackForward p{extent,
                            picture(x, y, x.size(1), "x"),
                            matrix(v, x, x.size(1), "v"),
                            matrix(u, x, v.size(0), "u"),
                            floats(s, v.size(0), "s"),
                            epilogue_of(y, scale, shift, picture(residual, y, y.size(1), "the residual"), mask, relu),
                            kept_of(z, q, q_scale, x.scalar_type(), extent.pixels, v.size(0))};
  check(back_to_back_forward(p, static_cast<Products>(products), tile, stream), "back_to_back");
}

void back_to_back_backward_op(const Tensor& dy, const MaybeTensor& mask, const Tensor& u, const MaybeTensor& scale, const MaybeTensor& s,
                              const Tensor& v, const MaybeTensor& z, const MaybeTensor& q, const MaybeTensor& q_scale,
                              const MaybeTensor& d, const MaybeTensor& partial, const Tensor& dx, int64_t products) {
  const Stream stream(dy);
  const BackToBackBackward p{gradient_of(dy, mask, u, scale, s, z, q, q_scale, d, partial, 64),
                             matrix(v, dy, dx.size(1), "v"), picture(dx, dy, dx.size(1), "dx")};
  check(back_to_back_backward(p, static_cast<Products>(products), stream), "back_to_back_backward");
}

// Elements of one channel that are adjacent in a dense [N, C, H, W]: 0 where channels are.
int64_t plane_of(const Tensor& t) { return t.is_contiguous() && t.size(1) > 1 ? t.size(2) * t.size(3) : 0; }

void epilogue_op(const Tensor& y, const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& residual, const MaybeTensor& mask,
                 bool relu) {
  const Stream stream(y);
  Picture added{};
  added.data = dense<void>(residual, y.scalar_type(), y.numel(), "the residual");
  const Epilogue p = epilogue_of(y, scale, shift, added, mask, relu);
  check(epilogue(p, y.numel(), plane_of(y), element_of(y), stream), "epilogue");
}

void pack_op(const Tensor& values, const Tensor& mask) {
  const Stream stream(values);
  auto* bits = dense<uint8_t>(mask, ScalarType::Byte, (values.numel() + 7) / 8, "mask");
  check(pack(whole(values, "values"), bits, values.numel(), element_of(values), stream), "pack");
}

void keep_masked_op(const Tensor& values, const Tensor& mask, const Tensor& out) {
  const Stream stream(values);
  const auto* bits = dense<uint8_t>(mask, ScalarType::Byte, (values.numel() + 7) / 8, "mask");
  void* to = dense<void>(out, values.scalar_type(), values.numel(), "out");
  check(keep_masked(whole(values, "values"), bits, to, values.numel(), element_of(values), stream), "keep_masked");
}

void quantize_op(const Tensor& z, const Tensor& q, const Tensor& q_scale) {
  const Stream stream(z);
  const Extent extent = extent_of(z);
  const int64_t rank = z.size(1);
  STD_TORCH_CHECK(plane_of(z) == plane_of(q), "q must lie as z does");
  const KeptZ kept{whole(z, "z"), dense<int8_t>(q, ScalarType::Char, extent.pixels * rank, "q"),
                   floats(q_scale, (extent.pixels + 63) / 64 * rank, "q_scale")};
  check(quantize(kept, z.size(0), rank, extent.plane, plane_of(z) != 0, element_of(z), stream), "quantize");
}

// [B, C, positions] with adjacent channels.
Features features(const Tensor& t, const float* norm, const char* name) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(1) == 1 || t.stride(1) == 1), name, " must be [B, C, positions] with adjacent channels");
  const auto stride = [&](int64_t i) { return t.size(i) == 1 ? 0 : t.stride(i); };
  return {data(t), stride(0), stride(2), norm};
}

void max_cosine_op(const Tensor& query, const Tensor& support, const MaybeTensor& weight, const Tensor& query_norm,
                   const Tensor& support_norm, const Tensor& best, const Tensor& winner, double eps, int64_t per_split,
                   int64_t products) {
  const Stream stream(query);
  const int64_t batch = query.size(0), queries = query.size(2), supports = support.size(2), splits = best.size(1);
  const MaxCosine p{features(query, floats(query_norm, batch * queries, "query_norm"), "query"),
                    features(support, floats(support_norm, batch * supports, "support_norm"), "support"),
                    floats(weight, batch * supports, "weight"),
                    floats(best, batch * splits * queries, "best"),
                    dense<int32_t>(winner, ScalarType::Int, batch * splits * queries, "winner"),
                    static_cast<float>(eps),
                    static_cast<int32_t>(batch),
                    static_cast<int32_t>(query.size(1)),
                    static_cast<int32_t>(queries),
                    static_cast<int32_t>(supports),
                    static_cast<int32_t>(splits),
                    static_cast<int32_t>(per_split)};
  check(max_cosine(p, static_cast<Products>(products), stream), "max_cosine");
}

void max_cosine_backward_op(const Tensor& dvalue, const Tensor& query, const Tensor& source, const MaybeTensor& weight,
                            const Tensor& row_of, const Tensor& winner, const Tensor& order, const Tensor& first_of,
                            const Tensor& coefficients, const MaybeTensor& dquery, const MaybeTensor& dsupport, double eps) {
  const Stream stream(query);
  const int64_t batch = query.size(0), channels = query.size(1), queries = query.size(2), supports = row_of.size(1);
  const CosineBackward p{features(query, nullptr, "query"),
                         // [B, C, supports], or the rows that won [n, C]
                         source.dim() == 3 ? features(source, nullptr, "source") : Features{data(source), 0, source.stride(0), nullptr},
                         dense<void>(dvalue, query.scalar_type(), batch * queries, "dvalue"),
                         floats(weight, batch * supports, "weight"),
                         dense<int64_t>(row_of, ScalarType::Long, batch * supports, "row_of"),
                         dense<int32_t>(winner, ScalarType::Int, batch * queries, "winner"),
                         dense<int64_t>(order, ScalarType::Long, batch * queries, "order"),
                         dense<int64_t>(first_of, ScalarType::Long, batch * (supports + 1), "first_of"),
                         floats(coefficients, batch * queries * 3, "coefficients"),
                         dense<void>(dquery, query.scalar_type(), batch * channels * queries, "dquery"),
                         dense<void>(dsupport, query.scalar_type(), batch * channels * supports, "dsupport"),
                         static_cast<float>(eps),
                         static_cast<int32_t>(batch),
                         static_cast<int32_t>(channels),
                         static_cast<int32_t>(queries),
                         static_cast<int32_t>(supports)};
  check(max_cosine_backward(p, element_of(query), stream), "max_cosine_backward");
}

// Whether the kernels by wgmma were compiled.
bool has_wgmma_op() { return kHasSm90a; }

void implement_for_any(torch::stable::detail::StableLibrary& m) { m.impl("cuda_has_wgmma", TORCH_BOX(&has_wgmma_op)); }

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cuda_project", TORCH_BOX(&project));
  m.impl("cuda_project_backward", TORCH_BOX(&project_backward_op));
  m.impl("cuda_back_to_back", TORCH_BOX(&back_to_back));
  m.impl("cuda_back_to_back_backward", TORCH_BOX(&back_to_back_backward_op));
  m.impl("cuda_epilogue", TORCH_BOX(&epilogue_op));
  m.impl("cuda_pack", TORCH_BOX(&pack_op));
  m.impl("cuda_keep_masked", TORCH_BOX(&keep_masked_op));
  m.impl("cuda_quantize", TORCH_BOX(&quantize_op));
  m.impl("cuda_max_cosine", TORCH_BOX(&max_cosine_op));
  m.impl("cuda_max_cosine_backward", TORCH_BOX(&max_cosine_backward_op));
}

}  // namespace

#ifdef SVF_FAST_EMULATION
// names of its own: the real library may be loaded beside it
STABLE_TORCH_LIBRARY(svf_fast_emulated, m) {
#include "schemas.inc"
}
STABLE_TORCH_LIBRARY_IMPL(svf_fast_emulated, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(svf_fast_emulated, CompositeExplicitAutograd, m) { implement_for_any(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(svf_fast_cpp, CUDA, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(svf_fast_cpp, CompositeExplicitAutograd, m) { implement_for_any(m); }
#endif
