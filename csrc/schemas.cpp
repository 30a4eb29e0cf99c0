// The schemas of all native ops. They write into tensors that they are given, and are called by svf_fast/backends alone; their fake
// kernels stand in backends/native.py. Geometry: height and width each of taps, stride, padding, dilation.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(svf_fast_cpp, m) {
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
  m.def("has_half_products() -> bool");
  m.def("pack(Tensor matrix, bool half) -> Tensor");
  m.def(
      "forward(Tensor x, Tensor? right, bool is_winograd, Tensor? left, Tensor? s, Tensor? shift, Tensor? residual, "
      "Tensor(a!) y, Tensor(b!)? z, Tensor(c!)? z_scale, Tensor(d!)? mask, bool relu, int[] geometry) -> ()");
  m.def(
      "backward(Tensor dy, Tensor? mask, Tensor? left, Tensor? s, Tensor? z, Tensor? z_scale, Tensor? right, "
      "Tensor(a!)? dx, Tensor(b!)? d, Tensor(c!)? ds, int[] geometry) -> ()");
  m.def("data_gradient(Tensor g, Tensor right, Tensor(a!) dx, int[] geometry) -> ()");
  m.def(
      "max_cosine(Tensor query, Tensor query_norm, Tensor support, Tensor support_norm, float eps, int first, "
      "Tensor(a!) value, Tensor(b!) winner) -> ()");
  m.def("quantize(Tensor z, Tensor(a!) q, Tensor(b!) scale) -> ()");
  m.def("pack_mask(Tensor values, Tensor(a!) mask) -> ()");
  m.def("keep_masked(Tensor values, Tensor mask, Tensor(a!) out) -> ()");
#include "cuda/schemas.inc"
}
