// The gradients of the max-cosine prior: the gradient of a maximum flows through its winner alone.
//
// i the winner of query j:  dq_j = α_j a_i w_i + β_j q_j,  da_i = Σ_j α_j q_j w_i + Σ_j γ_j a_i |w_i| / ‖a_i‖,
// α = dvalue / n, n = |w_i| ‖a_i‖ ‖q_j‖ + eps, β = δ |w_i| ‖a_i‖ / ‖q_j‖, γ = δ ‖q_j‖, δ = −α cos.
//
// First a warp a query: dot product and norms, kept as (α, γ, ‖a‖), and dq. Then a warp a support position and 256 channels: its queries in
// their order, so that sums have the same bits every time. Eight channels a thread throughout.
#include "numbers.cuh"

namespace svf::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Aligned {
  bool query, source, dquery, dsupport;
};

__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += ptx::from_lane(value, distance);
  }
  return value;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) query_kernel(const CosineBackward p, const Aligned aligned) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= static_cast<int64_t>(p.batch) * p.queries) {
    return;
  }
  const int64_t batch = at / p.queries, position = batch * p.supports + ptx::load_global(p.winner + at);
  const auto* query = static_cast<const T*>(p.query.data) + batch * p.query.batch + at % p.queries * p.query.position;
  const auto* source = static_cast<const T*>(p.source.data) + ptx::load_global(p.row_of + position);
  const int lane = threadIdx.x % 32;
  float dot = 0.0f, q_square = 0.0f, a_square = 0.0f;
  for (int c = lane * 8; c < p.channels; c += 256) {
    const Octet q = load_octet(query + c, p.channels - c, aligned.query);
    const Octet a = load_octet(source + c, p.channels - c, aligned.source);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      dot += q.value[i] * a.value[i];
      q_square += q.value[i] * q.value[i];
      a_square += a.value[i] * a.value[i];
    }
  }
  dot = sum_of_lanes(dot);
  const float q_norm = sqrtf(sum_of_lanes(q_square)), row_norm = sqrtf(sum_of_lanes(a_square));
  const float w = p.weight != nullptr ? ptx::load_global(p.weight + position) : 1.0f;
  const float a_norm = row_norm * fabsf(w), n = a_norm * q_norm + p.eps;
  const float alpha = to_float(ptx::load_global(static_cast<const T*>(p.dvalue) + at)) / n;
  const float delta = -alpha * dot * w / n;
  if (lane == 0) {
    ptx::store_global(p.coefficients + 3 * at, alpha);
    ptx::store_global(p.coefficients + 3 * at + 1, delta * q_norm);
    ptx::store_global(p.coefficients + 3 * at + 2, row_norm);
  }
  if (p.dquery == nullptr) {
    return;
  }
  // the norm of a zero vector has gradient 0
  const float beta = q_norm > 0.0f ? delta * a_norm / q_norm : 0.0f;
  for (int c = lane * 8; c < p.channels; c += 256) {
    Octet q = load_octet(query + c, p.channels - c, aligned.query);
    const Octet a = load_octet(source + c, p.channels - c, aligned.source);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q.value[i] = alpha * w * a.value[i] + beta * q.value[i];
    }
    store_octet(static_cast<T*>(p.dquery) + at * p.channels + c, q, p.channels - c, aligned.dquery);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) support_kernel(const CosineBackward p, const Aligned aligned) {
  const int blocks = static_cast<int>(divide_up(p.channels, 256));
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, at = warp / blocks;
  const int c = static_cast<int>(warp % blocks) * 256 + threadIdx.x % 32 * 8, count = p.channels - c;
  if (at >= static_cast<int64_t>(p.batch) * p.supports || count <= 0) {
    return;
  }
  const int64_t batch = at / p.supports, first = batch * (p.supports + 1) + at % p.supports;
  const int64_t begin = ptx::load_global(p.first_of + first), end = ptx::load_global(p.first_of + first + 1);
  const auto* queries = static_cast<const T*>(p.query.data) + batch * p.query.batch + c;
  const float* coefficients = p.coefficients + 3 * batch * p.queries;
  const int64_t* order = p.order + batch * p.queries;
  Octet total{};
  float gamma = 0.0f;
  for (int64_t place = begin; place < end; ++place) {
    const int64_t j = ptx::load_global(order + place);
    const float alpha = ptx::load_global(coefficients + 3 * j);
    gamma += ptx::load_global(coefficients + 3 * j + 1);
    const Octet q = load_octet(queries + j * p.query.position, count, aligned.query);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      total.value[i] += alpha * q.value[i];
    }
  }
  if (begin < end) {
    const Octet a = load_octet(static_cast<const T*>(p.source.data) + ptx::load_global(p.row_of + at) + c, count, aligned.source);
    // any of its queries knows the row's norm
    const float norm = ptx::load_global(coefficients + 3 * ptx::load_global(order + begin) + 2);
    const float w = p.weight != nullptr ? ptx::load_global(p.weight + at) : 1.0f;
    const float factor = norm > 0.0f ? gamma * fabsf(w) / norm : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      total.value[i] = w * total.value[i] + factor * a.value[i];
    }
  }
  store_octet(static_cast<T*>(p.dsupport) + at * p.channels + c, total, count, aligned.dsupport);
}

}  // namespace

cudaError_t max_cosine_backward(const CosineBackward& p, Element element, cudaStream_t stream) {
  return for_element(element, [&](auto zero) {
    using T = decltype(zero);
    const auto bytes = static_cast<int64_t>(sizeof(T));
    const Aligned aligned{is_aligned(p.query.data, (p.query.batch | p.query.position) * bytes),
                          is_aligned(p.source.data, (p.source.batch | p.source.position) * bytes), is_aligned(p.dquery, p.channels * bytes),
                          is_aligned(p.dsupport, p.channels * bytes)};
    const int64_t queries = static_cast<int64_t>(p.batch) * p.queries, supports = static_cast<int64_t>(p.batch) * p.supports;
    const cudaError_t status = ptx::launch(query_kernel<T>, divide_up(queries, kWarps), kThreads, 0, stream, p, aligned);
    if (status != cudaSuccess || p.dsupport == nullptr) {
      return status;
    }
    return ptx::launch(support_kernel<T>, divide_up(supports * divide_up(p.channels, 256), kWarps), kThreads, 0, stream, p, aligned);
  });
}

}  // namespace svf::cuda
