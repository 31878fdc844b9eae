// GELU and response normalisation over the hidden channels of a block, on a CPU: what lies between the two products.
// Built by native.py with REAL = float or double, called by pointwise_cpu.py; a plain C interface, no header of torch.
//
// B images, N positions per image, K hidden channels; all arrays are (B, N, K), (B, K) or (K,), contiguous. Work is
// divided by images and channels, never by positions, so sums do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "channels.h"

namespace {

// The normal distribution, of which GELU is made: x times its distribution function.
template <typename T, int W>
struct Normal {
  using Vector = typename Channels<T, W>::type;

  static inline Vector distribution(Vector x) {
    for (int i = 0; i < W; ++i) x[i] = T(0.5) * (1 + std::erf(x[i] * T(0.70710678118654752440)));
    return x;
  }

  // GELU's derivative at x, where `value` is GELU(x) and value / x the distribution function.
  static inline Vector slope(Vector x, const Vector& value) {
    for (int i = 0; i < W; ++i) {
      const T density = T(0.39894228040143267794) * std::exp(T(-0.5) * x[i] * x[i]);
      x[i] = (x[i] == 0 ? T(0.5) : value[i] / x[i]) + x[i] * density;
    }
    return x;
  }
};

template <int W>
struct Normal<float, W> {
  using Vector = typename Channels<float, W>::type;
  using Integers = typename Channels<int32_t, W>::type;

  static inline Vector distribution(const Vector& x) { return 0.5f + 0.5f * erf(x * 0.70710678f); }
  static inline Vector slope(const Vector& x, const Vector& value) {
    const Vector half = Vector{} + 0.5f, u = x * x;
    return (u < 1e-16f ? half : quotient(value, x)) + x * (0.39894228f * exp_of_negative(-0.5f * u));
  }

  // AVX-512 divides half as fast as AVX2; there a product with the reciprocal (14 bits and a Newton step: 2 in the last
  // place) takes a third of the time.
  static inline Vector quotient(const Vector& p, const Vector& q) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Vector) == sizeof(__m512)) {
      const Vector r = (Vector)_mm512_rcp14_ps((__m512)q);
      return p * (r * (2.0f - q * r));
    }
#endif
    return p / q;
  }

  // x P(x²) / Q(x²), fitted to a relative error of 2e-8 up to 3.925, beyond which erf rounds to 1 (exactly, so that GELU
  // of a large negative number is 0). NaN stays NaN.
  static inline Vector erf(const Vector& x) {
    const Vector end = Vector{} + 3.925f, one = Vector{} + 1.0f, u = x * x;
    Vector p = Vector{} + 2.046187554e-06f, q = Vector{} + 3.804876624e-05f;
    p = p * u + 2.848304100e-04f;
    q = q * u + 1.163691765e-03f;
    p = p * u + 3.771840834e-03f;
    q = q * u + 1.498176507e-02f;
    p = p * u + 5.276709137e-02f;
    q = q * u + 1.141757515e-01f;
    p = p * u + 1.905768150e-01f;
    q = q * u + 5.022270381e-01f;
    p = p * u + 1.128379146e+00f;
    q = q * u + 1.0f;
    const Vector value = quotient(x * p, q);
    return x > end ? one : (x < -end ? -one : value);
  }

  // 2^k 2^f with |f| <= 1/2; 2^f by its Taylor series, 7 terms past the constant one: 5e-9.
  static inline Vector exp_of_negative(const Vector& given) {
    const Vector least = Vector{} - 87.0f, zero{};  // e^-87 is the last power above the denormal numbers
    const Vector x = given < least ? least : given;
    const Vector scaled = x * 1.44269504f;
    const Vector shifted = scaled + 12582912.0f;  // 1.5 · 2^23: rounds to whole numbers and leaves them in the low bits
    const Vector f = scaled - (shifted - 12582912.0f);
    Vector power = Vector{} + 1.525273380e-05f;
    power = power * f + 1.540353039e-04f;
    power = power * f + 1.333355815e-03f;
    power = power * f + 9.618129108e-03f;
    power = power * f + 5.550410866e-02f;
    power = power * f + 2.402265070e-01f;
    power = power * f + 6.931471806e-01f;
    power = power * f + 1.0f;
    Integers bits, exponent;
    std::memcpy(&bits, &shifted, sizeof bits);
    std::memcpy(&exponent, &power, sizeof exponent);
    exponent += bits << 23;
    std::memcpy(&power, &exponent, sizeof power);
    return given < least ? zero : power;
  }
};

// Calls run(image, begin, end) for ranges of the channels of every image: all of them, where there are enough images.
template <typename Run>
inline void for_ranges(int64_t images, int64_t channels, int64_t threads, Run run) {
  const int64_t parts = std::min((4 * threads + images - 1) / images, (channels + 63) / 64);
  const int64_t width = ((channels + parts - 1) / parts + 15) / 16 * 16;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < images * parts; ++item) {
    const int64_t begin = std::min(item % parts * width, channels);
    run(item / parts, begin, std::min(begin + width, channels));
  }
}

// Calls run<W, ALL>(offset in (B, N, K), offset in (B, K), n) for the positions of an image, row by row.
template <typename T, typename Run>
inline void for_positions(int64_t image, int64_t positions, int64_t channels, int64_t begin, int64_t end, Run run) {
  for (int64_t i = 0; i < positions; ++i)
    for_channels<T>(begin, end, [&]<int W, bool ALL>(int64_t c, int64_t n) {
      run.template operator()<W, ALL>((image * positions + i) * channels + c, image * channels + c, n);
    });
}

// The norm of each channel of an image, and their mean plus eps.
template <typename T>
inline T norms(const T* sums, int64_t channels, T eps, T* norm) {
  T total = 0;
  for (int64_t k = 0; k < channels; ++k) total += norm[k] = std::sqrt(sums[k]);
  return total / channels + eps;
}

}  // namespace

// a = GELU(h + bias); sums = its squares summed over positions; scale = GRN's factor 1 + gamma norm / (mean norm + eps).
// Unless beta is null, a = a · scale + beta.
extern "C" void fcmae_activate(int64_t images, int64_t positions, int64_t channels, const REAL* h, const REAL* bias,
                               const REAL* gamma, const REAL* beta, double eps, REAL* a, REAL* sums, REAL* scale,
                               int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    for_ranges(images, channels, threads, [&](int64_t image, int64_t begin, int64_t end) {
      std::fill(sums + image * channels + begin, sums + image * channels + end, REAL(0));
      for_positions<REAL>(image, positions, channels, begin, end, [&]<int W, bool ALL>(int64_t at, int64_t k, int64_t n) {
        using A = Access<REAL, W, ALL>;
        const auto x = A::load(h + at, n) + A::load(bias + k - image * channels, n);
        const auto value = x * Normal<REAL, W>::distribution(x);
        A::store(sums + k, A::load(sums + k, n) + value * value, n);
        A::store(a + at, value, n);
      });
    });
#pragma omp for schedule(static)
    for (int64_t image = 0; image < images; ++image) {
      REAL* s = scale + image * channels;
      const REAL mean = norms(sums + image * channels, channels, static_cast<REAL>(eps), s);
      for (int64_t k = 0; k < channels; ++k) s[k] = 1 + gamma[k] * (s[k] / mean);
    }
    if (beta)
      for_ranges(images, channels, threads, [&](int64_t image, int64_t begin, int64_t end) {
        for_positions<REAL>(image, positions, channels, begin, end,
                            [&]<int W, bool ALL>(int64_t at, int64_t k, int64_t n) {
                              using A = Access<REAL, W, ALL>;
                              const auto offset = A::load(beta + k - image * channels, n);
                              A::store(a + at, A::load(a + at, n) * A::load(scale + k, n) + offset, n);
                            });
      });
  }
}

// a = GELU(h + bias) and, unless `product` is null, product = a · scale + beta.
extern "C" void fcmae_reactivate(int64_t images, int64_t positions, int64_t channels, const REAL* h, const REAL* bias,
                                 const REAL* scale, const REAL* beta, REAL* a, REAL* product, int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  for_ranges(images, channels, threads, [&](int64_t image, int64_t begin, int64_t end) {
    for_positions<REAL>(image, positions, channels, begin, end, [&]<int W, bool ALL>(int64_t at, int64_t k, int64_t n) {
      using A = Access<REAL, W, ALL>;
      const auto x = A::load(h + at, n) + A::load(bias + k - image * channels, n);
      const auto value = x * Normal<REAL, W>::distribution(x);
      A::store(a + at, value, n);
      if (!product) return;
      A::store(product + at, value * A::load(scale + k, n) + A::load(beta + k - image * channels, n), n);
    });
  });
}

// From the gradients g (B, C, K) of each image's own weight w · scale, w (C, K): adds to w's gradient, gives scale's, and
// leaves the images' weights in place of g.
extern "C" void fcmae_unfold(int64_t images, int64_t width, int64_t channels, REAL* g, const REAL* w, const REAL* scale,
                             REAL* grad_w, REAL* grad_scale, int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    for_ranges(images, channels, threads, [&](int64_t image, int64_t begin, int64_t end) {
      std::fill(grad_scale + image * channels + begin, grad_scale + image * channels + end, REAL(0));
      for_positions<REAL>(image, width, channels, begin, end, [&]<int W, bool ALL>(int64_t at, int64_t k, int64_t n) {
        using A = Access<REAL, W, ALL>;
        const auto term = A::load(g + at, n) * A::load(w + at - image * width * channels, n);
        A::store(grad_scale + k, A::load(grad_scale + k, n) + term, n);
      });
    });
#pragma omp for schedule(static)
    for (int64_t c = 0; c < width; ++c)
      for_channels<REAL>(0, channels, [&]<int W, bool ALL>(int64_t k, int64_t n) {
        using A = Access<REAL, W, ALL>;
        auto sum = A::load(grad_w + c * channels + k, n);
        const auto own = A::load(w + c * channels + k, n);
        for (int64_t image = 0; image < images; ++image) {
          REAL* at = g + (image * width + c) * channels + k;
          const auto s = A::load(scale + image * channels + k, n);
          sum += A::load(at, n) * s;
          A::store(at, own * s, n);
        }
        A::store(grad_w + c * channels + k, sum, n);
      });
  }
}

// The gradient of h, in place of that of a · scale (or of a, where `scale` is null and grad_scale given), and per image
// the gradients of gamma and of fc1's bias, (B, K). `own` (B, K) is workspace.
extern "C" void fcmae_activation_gradient(int64_t images, int64_t positions, int64_t channels, const REAL* h,
                                          const REAL* bias, const REAL* a, const REAL* scale, const REAL* sums,
                                          const REAL* gamma, double eps, REAL* grad, REAL* grad_scale, REAL* grad_gamma,
                                          REAL* grad_bias, REAL* own, int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    if (scale)
      for_ranges(images, channels, threads, [&](int64_t image, int64_t begin, int64_t end) {
        std::fill(grad_scale + image * channels + begin, grad_scale + image * channels + end, REAL(0));
        for_positions<REAL>(image, positions, channels, begin, end,
                            [&]<int W, bool ALL>(int64_t at, int64_t k, int64_t n) {
                              using A = Access<REAL, W, ALL>;
                              const auto term = A::load(grad + at, n) * A::load(a + at, n);
                              A::store(grad_scale + k, A::load(grad_scale + k, n) + term, n);
                            });
      });
#pragma omp for schedule(static)
    for (int64_t image = 0; image < images; ++image) {
      const REAL* g = grad_scale + image * channels;
      REAL *norm = own + image * channels, *to_gamma = grad_gamma + image * channels;
      const REAL mean = norms(sums + image * channels, channels, static_cast<REAL>(eps), norm);
      REAL through_mean = 0;
      for (int64_t k = 0; k < channels; ++k) {
        to_gamma[k] = g[k] * norm[k] / mean;
        through_mean += gamma[k] * to_gamma[k];
      }
      through_mean /= channels * mean;
      // By how much an activation enters its own gradient: the norm's gradient over the norm, 0 where the norm is 0.
      for (int64_t k = 0; k < channels; ++k)
        norm[k] = norm[k] > 0 ? (g[k] * gamma[k] / mean - through_mean) / norm[k] : 0;
    }
    for_ranges(images, channels, threads, [&](int64_t image, int64_t begin, int64_t end) {
      std::fill(grad_bias + image * channels + begin, grad_bias + image * channels + end, REAL(0));
      for_positions<REAL>(image, positions, channels, begin, end, [&]<int W, bool ALL>(int64_t at, int64_t k, int64_t n) {
        using A = Access<REAL, W, ALL>;
        const auto x = A::load(h + at, n) + A::load(bias + k - image * channels, n), value = A::load(a + at, n);
        auto g = A::load(grad + at, n);
        if (scale) g *= A::load(scale + k, n);
        g = (g + value * A::load(own + k, n)) * Normal<REAL, W>::slope(x, value);
        A::store(grad_bias + k, A::load(grad_bias + k, n) + g, n);
        A::store(grad + at, g, n);
      });
    });
  }
}
