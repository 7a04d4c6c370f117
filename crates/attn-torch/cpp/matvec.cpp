// One row times a matrix, as decoding a token does: it costs what reading the matrix costs.
#include "shim.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#if defined(__x86_64__)
#include <immintrin.h>

// The file is compiled for any x86-64; these functions run where `served` has seen the instructions.
#define AVX2 __attribute__((target("avx2,fma")))

namespace {

constexpr int64_t kLanes = 8;
// Bytes ahead of the loads, beyond what the processor fetches by itself.
constexpr int64_t kAhead = 1024;
// Least bytes of a matrix that are worth a thread.
constexpr int64_t kBytesPerThread = 128 << 10;

AVX2 inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }

AVX2 inline __m256 load(const at::BFloat16* p) {
  auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

AVX2 inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <typename T>
AVX2 inline void ahead(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
}

// y[j] = Σ_k w[j, k] x[k] for the rows of `w` from `begin` to `end`.
template <typename T>
AVX2 void rows(const T* w, const float* x, float* y, int64_t n_in, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const T* row = w + j * n_in;
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    int64_t k = 0;
    for (; k + 4 * kLanes <= n_in; k += 4 * kLanes) {
      ahead(row + k);
      if (sizeof(T) == 4) ahead(row + k + 2 * kLanes);
      s0 = _mm256_fmadd_ps(load(row + k), _mm256_loadu_ps(x + k), s0);
      s1 = _mm256_fmadd_ps(load(row + k + kLanes), _mm256_loadu_ps(x + k + kLanes), s1);
      s2 = _mm256_fmadd_ps(load(row + k + 2 * kLanes), _mm256_loadu_ps(x + k + 2 * kLanes), s2);
      s3 = _mm256_fmadd_ps(load(row + k + 3 * kLanes), _mm256_loadu_ps(x + k + 3 * kLanes), s3);
    }
    float total = sum(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
    for (; k < n_in; ++k) total += static_cast<float>(row[k]) * x[k];
    y[j] = total;
  }
}

// y[j] = Σ_k w[k, j] x[k] for the columns of `w` from `begin` to `end`.
template <typename T>
AVX2 void columns(const T* w, const float* x, float* y, int64_t n_in, int64_t n_out, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 8;
  std::fill(y + begin, y + end, 0.0f);
  int64_t k = 0;
  for (; k + kRows <= n_in; k += kRows) {
    const T* row = w + k * n_out;
    __m256 factors[kRows];
    for (int64_t r = 0; r < kRows; ++r) factors[r] = _mm256_set1_ps(x[k + r]);
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      __m256 even = _mm256_loadu_ps(y + j), odd = _mm256_setzero_ps();
      for (int64_t r = 0; r < kRows; r += 2) {
        even = _mm256_fmadd_ps(load(row + r * n_out + j), factors[r], even);
        odd = _mm256_fmadd_ps(load(row + (r + 1) * n_out + j), factors[r + 1], odd);
      }
      _mm256_storeu_ps(y + j, _mm256_add_ps(even, odd));
    }
    for (; j < end; ++j) {
      for (int64_t r = 0; r < kRows; ++r) y[j] += static_cast<float>(row[r * n_out + j]) * x[k + r];
    }
  }
  for (; k < n_in; ++k) {
    for (int64_t j = begin; j < end; ++j) y[j] += static_cast<float>(w[k * n_out + j]) * x[k];
  }
}

template <typename T>
at::Tensor product(const at::Tensor& w, const at::Tensor& x, const at::Tensor* bias) {
  int64_t n_out = w.size(0), n_in = w.size(1);
  auto wide = x.to(at::kFloat).contiguous();
  auto y = at::empty({n_out}, wide.options());
  const T* from = w.const_data_ptr<T>();
  const float* in = wide.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  bool by_row = w.is_contiguous();
  // Whole cache lines of `y` to each thread.
  int64_t n_blocks = (n_out + 63) / 64;
  int64_t grain = std::max<int64_t>(1, kBytesPerThread / (64 * std::max<int64_t>(1, n_in) * static_cast<int64_t>(sizeof(T))));
  at::parallel_for(0, n_blocks, grain, [&](int64_t first, int64_t last) {
    int64_t begin = first * 64, end = std::min(last * 64, n_out);
    by_row ? rows(from, in, out, n_in, begin, end) : columns(from, in, out, n_in, n_out, begin, end);
  });
  if (bias) y.add_(*bias);
  return y.to(w.scalar_type());
}

bool served(const at::Tensor& w, const at::Tensor& x, const at::Tensor* bias) {
  static const bool has_units = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  auto kind = w.scalar_type();
  auto fits = [&](const at::Tensor& t) { return t.is_cpu() && t.scalar_type() == kind && t.layout() == at::kStrided; };
  auto learns = [](const at::Tensor& t) { return t.requires_grad(); };
  return has_units && (kind == at::kFloat || kind == at::kBFloat16) && fits(w) && fits(x) && (!bias || fits(*bias)) &&
         (w.is_contiguous() || w.t().is_contiguous()) &&
         !(at::GradMode::is_enabled() && (learns(w) || learns(x) || (bias && learns(*bias)))) &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

}  // namespace
#endif

extern "C" {

// `w x + bias` for `w` `[out, in]`, `x` `[in]` and `bias` `[out]` or null; null where `served` says no.
int attn_matvec(const at::Tensor* w, const at::Tensor* x, const at::Tensor* bias, at::Tensor** out, char** err) {
  return attempt(err, [&] {
    *out = nullptr;
#if defined(__x86_64__)
    TORCH_CHECK(w->dim() == 2 && x->dim() == 1 && x->size(0) == w->size(1), "matrix ", w->sizes(), ", vector ",
                x->sizes());
    TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w->size(0)), "matrix ", w->sizes(), ", bias of another shape");
    if (!served(*w, *x, bias)) return;
    auto y = w->scalar_type() == at::kFloat ? product<float>(*w, *x, bias) : product<at::BFloat16>(*w, *x, bias);
    *out = new at::Tensor(std::move(y));
#endif
  });
}

}  // extern "C"
