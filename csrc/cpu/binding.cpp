// The CPU kernels as ops of torch, through its stable ABI: tensors to plain structs, checks, and the choice of the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "instruction_sets.h"
#include "kernels.h"

namespace {

using svf::Picture;
using svf::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

svf::Threads threads() {
  return {
      static_cast<int64_t>(torch::stable::get_num_threads()), [](int64_t count, void* context, svf::Body body) {
        torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
      }};
}

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::kFloat;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Char: return Type::kInt8;
    default: STD_TORCH_CHECK(false, "the CPU kernels take float32 and bfloat16");
  }
}

void* data(const MaybeTensor& t) { return t ? t->data_ptr() : nullptr; }

// A dense vector in single precision, or null.
float* vector(const MaybeTensor& t, int64_t count, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      type_of(*t) == Type::kFloat && t->is_contiguous() && t->numel() == count, name, " must be ", count,
      " adjacent float32 values, got ", t->numel());
  return static_cast<float*>(t->data_ptr());
}

// A 4-D tensor whose channels are adjacent.
Picture picture(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.size(1) == 1 || t.stride(1) == 1), name, " must be [N, C, H, W] with adjacent channels");
  return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(3)};
}

// A dense 4-D tensor in channels_last, of this type and these extents.
void check_dense(const MaybeTensor& t, Type type, const std::array<int64_t, 4>& extents, const char* name) {
  if (!t) return;
  for (int64_t dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(
        t->dim() == 4 && t->size(dim) == extents[dim], name, " must be [", extents[0], ", ", extents[1], ", ", extents[2], ", ",
        extents[3], "]");
  STD_TORCH_CHECK(type_of(*t) == type, name, " has another dtype than expected");
  int64_t step = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(t->size(dim) == 1 || t->stride(dim) == step, name, " must be dense in channels_last");
    step *= t->size(dim);
  }
}

svf::Geometry geometry_of(const Tensor& in, const Tensor& out, const std::vector<int64_t>& g) {
  STD_TORCH_CHECK(g.size() == 8, "geometry must be eight integers, got ", g.size());
  STD_TORCH_CHECK(in.dim() == 4 && out.dim() == 4 && in.size(0) == out.size(0), "input and output must be batches of one size");
  for (int64_t axis = 0; axis < 2; ++axis) {
    const int64_t reach = in.size(2 + axis) + 2 * g[4 + axis] - g[6 + axis] * (g[axis] - 1) - 1;
    STD_TORCH_CHECK(
        g[axis] > 0 && g[2 + axis] > 0 && g[6 + axis] > 0 && reach >= 0 && reach / g[2 + axis] + 1 == out.size(2 + axis),
        "the output's extents do not fit the input and the geometry");
  }
  return {in.size(0),   {in.size(2), in.size(3)}, {out.size(2), out.size(3)}, {g[0], g[1]}, {g[2], g[3]},
          {g[4], g[5]}, {g[6], g[7]}};
}

void check_packed(const MaybeTensor& packed, int64_t taps, int64_t k, int64_t n, Type type, const char* name) {
  if (!packed) return;
  const svf::Matrix m{nullptr, type, taps, 0, k, 0, n, 0};
  const size_t bytes = svf::kernels().packed_bytes(m, type == Type::kBFloat16);
  STD_TORCH_CHECK(
      packed->numel() == static_cast<int64_t>(bytes), name, " was packed for another layer or instruction set: ",
      packed->numel(), " bytes, expected ", bytes);
}

std::string instruction_sets() { return svf::instruction_set_names(); }
std::string instruction_set() { return svf::kernels().name; }
void use_instruction_set(const std::string& name) {
  STD_TORCH_CHECK(
      svf::use_instruction_set(name), "instruction set must be one of ", svf::instruction_set_names(), ", got ", name);
}
bool has_half_products() { return svf::kernels().has_half_products; }

// matrix [taps, k, n] → bytes.
Tensor pack(const Tensor& matrix, bool half) {
  STD_TORCH_CHECK(matrix.dim() == 3, "matrix must be [taps, k, n]");
  const svf::Matrix m{matrix.data_ptr(),  type_of(matrix),  matrix.size(0), matrix.stride(0),
                      matrix.size(1),     matrix.stride(1), matrix.size(2), matrix.stride(2)};
  const auto bytes = static_cast<int64_t>(svf::kernels().packed_bytes(m, half));
  Tensor packed = torch::stable::new_empty(matrix, {bytes}, ScalarType::Byte);
  svf::kernels().pack(m, half, packed.data_ptr(), threads());
  return packed;
}

void forward(
    const Tensor& x, const MaybeTensor& right, bool is_winograd, const MaybeTensor& left, const MaybeTensor& s,
    const MaybeTensor& shift, const MaybeTensor& residual, const Tensor& y, const MaybeTensor& z, const MaybeTensor& z_scale,
    const MaybeTensor& mask, bool relu, const std::vector<int64_t>& geometry) {
  svf::Forward f{};
  f.geometry = geometry_of(x, y, geometry);
  f.type = type_of(y);
  f.outputs = y.size(1);
  f.rank = s ? s->numel() : f.outputs;
  f.inputs = x.size(1);
  f.x = picture(x, "x");
  f.right = data(right);
  f.left = data(left);
  f.is_winograd = is_winograd;
  f.s = vector(s, f.rank, "s");
  f.shift = vector(shift, f.outputs, "shift");
  if (residual) f.residual = picture(*residual, "residual");
  f.y = y.data_ptr();
  f.z = data(z);
  const int64_t groups = (f.geometry.out_pixels() + svf::kGroupPixels - 1) / svf::kGroupPixels;
  f.z_scale = vector(z_scale, groups * f.rank, "z_scale");
  f.mask = static_cast<uint8_t*>(data(mask));
  f.relu = relu;
  STD_TORCH_CHECK(type_of(x) == f.type && (!residual || type_of(*residual) == f.type), "x, residual and y must have one dtype");
  STD_TORCH_CHECK(right || f.inputs == f.rank, "x must be z where there are no right factors");
  STD_TORCH_CHECK(!mask || mask->numel() == (y.numel() + 7) / 8, "mask must have one bit an element of y");
  STD_TORCH_CHECK(
      !is_winograd || (!z_scale && (f.type == Type::kFloat || !has_half_products()) && geometry[0] == 3 && geometry[1] == 3 &&
                       geometry[2] == 1 && geometry[3] == 1),
      "Winograd's products are for 3x3 taps of stride 1 in single precision");
  check_dense(y, f.type, {y.size(0), f.outputs, y.size(2), y.size(3)}, "y");
  check_dense(z, z_scale ? Type::kInt8 : f.type, {y.size(0), f.rank, y.size(2), y.size(3)}, "z");
  for (int64_t dim = 0; dim < 4; ++dim)
    STD_TORCH_CHECK(!residual || residual->size(dim) == y.size(dim), "residual must have y's shape");
  check_packed(right, is_winograd ? 16 : geometry[0] * geometry[1], f.inputs, f.rank, f.type, "right");
  check_packed(left, 1, f.rank, f.outputs, f.type, "left");
  svf::kernels().forward(f, threads());
}

void backward(
    const Tensor& dy, const MaybeTensor& mask, const MaybeTensor& left, const MaybeTensor& s, const MaybeTensor& z,
    const MaybeTensor& z_scale, const MaybeTensor& right, const MaybeTensor& dx, const MaybeTensor& d, const MaybeTensor& ds,
    const std::vector<int64_t>& geometry) {
  svf::Backward b{};
  b.geometry = geometry_of(dx ? *dx : dy, dy, geometry);
  b.type = type_of(dy);
  b.outputs = dy.size(1);
  b.rank = s ? s->numel() : 0;
  b.inputs = dx ? dx->size(1) : 0;
  b.dy = picture(dy, "dy");
  if (dx) b.dx = picture(*dx, "dx");
  b.d = data(d);
  b.z = data(z);
  b.z_type = z ? type_of(*z) : b.type;
  b.mask = static_cast<const uint8_t*>(data(mask));
  b.left = data(left);
  b.right = data(right);
  b.s = vector(s, b.rank, "s");
  if (z_scale) b.z_scale = vector(z_scale, z_scale->numel(), "z_scale");
  b.z_scale_step = z_scale && z_scale->size(0) > 1 ? b.rank : 0;
  STD_TORCH_CHECK(!mask || mask->numel() == (dy.numel() + 7) / 8, "mask must have one bit an element of dy");
  const int64_t n = dy.size(0), height = dy.size(2), width = dy.size(3);
  check_dense(z, b.z_type, {n, b.rank, height, width}, "z");
  check_dense(d, b.type, {n, b.outputs, height, width}, "d");
  if (dx) check_dense(dx, b.type, {n, right ? b.inputs : b.rank, dx->size(2), dx->size(3)}, "dx");
  const int64_t groups = (b.geometry.out_pixels() + svf::kGroupPixels - 1) / svf::kGroupPixels;
  STD_TORCH_CHECK(
      !z_scale || (z_scale->dim() == 2 && z_scale->size(1) == b.rank && (z_scale->size(0) == 1 || z_scale->size(0) == groups)),
      "z_scale must be [1 or ", groups, ", ", b.rank, "]");
  STD_TORCH_CHECK(!ds || (left && s && z), "ds needs left factors, s and z");
  check_packed(left, 1, b.outputs, b.rank, b.type, "left");
  check_packed(right, 1, b.rank, b.inputs, b.type, "right");
  const svf::Tiling tiling = svf::backward_tiles(b.geometry.out_pixels());
  std::vector<float> partial(ds ? tiling.tiles * b.rank : 0);
  b.partial = ds ? partial.data() : nullptr;
  svf::kernels().backward(b, threads());
  if (!ds) return;
  // in the order of the tiles, whichever thread took them
  float* sum = vector(ds, b.rank, "ds");
  for (int64_t r = 0; r < b.rank; ++r) {
    double total = 0;
    for (int64_t t = 0; t < tiling.tiles; ++t) total += partial[t * b.rank + r];
    sum[r] = static_cast<float>(total);
  }
}

void data_gradient(const Tensor& g, const Tensor& right, const Tensor& dx, const std::vector<int64_t>& geometry) {
  const svf::Geometry geometry_of_v = geometry_of(dx, g, geometry);
  check_dense(g, type_of(g), {g.size(0), g.size(1), g.size(2), g.size(3)}, "g");
  check_dense(dx, type_of(g), {dx.size(0), dx.size(1), dx.size(2), dx.size(3)}, "dx");
  check_packed(right, geometry[0] * geometry[1], g.size(1), dx.size(1), type_of(g), "right");
  const svf::DataGradient d{geometry_of_v, dx.size(1),    g.size(1),        type_of(g),
                            g.data_ptr(),                 dx.data_ptr(), right.data_ptr()};
  svf::kernels().data_gradient(d, threads());
}

void max_cosine(
    const Tensor& query, const Tensor& query_norm, const Tensor& support, const Tensor& support_norm, double eps,
    int64_t first, const Tensor& value, const Tensor& winner) {
  const int64_t channels = support.size(1), queries = value.numel(), supports = support.size(0);
  check_packed(query, 1, channels, queries, Type::kFloat, "query");
  STD_TORCH_CHECK(support.is_contiguous() && type_of(support) == Type::kFloat, "support must be dense float32 rows");
  STD_TORCH_CHECK(
      winner.scalar_type() == ScalarType::Int && winner.is_contiguous() && winner.numel() == queries,
      "winner must be int32, one a query position");
  const svf::MaxCosine m{
      channels, queries, supports, query.data_ptr(), static_cast<const float*>(support.data_ptr()),
      vector(query_norm, queries, "query_norm"), vector(support_norm, supports, "support_norm"), static_cast<float>(eps),
      vector(value, queries, "value"), static_cast<int32_t*>(winner.data_ptr()), static_cast<int32_t>(first)};
  svf::kernels().max_cosine(m, threads());
}

void quantize(const Tensor& z, const Tensor& q, const Tensor& scale) {
  const std::array<int64_t, 4> extents{z.size(0), z.size(1), z.size(2), z.size(3)};
  check_dense(z, type_of(z), extents, "z");
  check_dense(q, Type::kInt8, extents, "q");
  const int64_t rank = z.size(1), pixels = rank == 0 ? 0 : z.numel() / rank;
  const svf::Quantize all{
      pixels, rank, type_of(z), z.data_ptr(), static_cast<int8_t*>(q.data_ptr()),
      vector(scale, (pixels + svf::kGroupPixels - 1) / svf::kGroupPixels * rank, "scale")};
  svf::kernels().quantize(all, threads());
}

void pack_mask(const Tensor& values, const Tensor& mask) {
  STD_TORCH_CHECK(values.is_contiguous() && mask.numel() == (values.numel() + 7) / 8, "values must be dense, one bit each");
  svf::kernels().pack_mask(
      {values.numel(), type_of(values), values.data_ptr(), static_cast<uint8_t*>(mask.data_ptr()), nullptr}, threads());
}

void keep_masked(const Tensor& values, const Tensor& mask, const Tensor& out) {
  STD_TORCH_CHECK(values.is_contiguous() && out.is_contiguous(), "values and out must be dense");
  STD_TORCH_CHECK(mask.numel() == (values.numel() + 7) / 8, "mask must have one bit a value");
  svf::kernels().keep_masked(
      {values.numel(), type_of(values), values.data_ptr(), static_cast<uint8_t*>(mask.data_ptr()), out.data_ptr()}, threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(svf_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
  m.impl("has_half_products", TORCH_BOX(&has_half_products));
}

STABLE_TORCH_LIBRARY_IMPL(svf_fast_cpp, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("data_gradient", TORCH_BOX(&data_gradient));
  m.impl("max_cosine", TORCH_BOX(&max_cosine));
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("keep_masked", TORCH_BOX(&keep_masked));
}
