// Vectors over neighbouring channels, for the compilers' own vector types (GCC, Clang): any width, any processor.

#pragma once

#include <cstdint>
#include <cstring>

template <typename T, int W>
struct Channels {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};

// W channels, of which `n` exist unless ALL do.
template <typename T, int W, bool ALL>
struct Access {
  using Vector = typename Channels<T, W>::type;
  static inline Vector load(const T* from, int64_t n) {
    Vector v{};
    std::memcpy(&v, from, ALL ? sizeof v : n * sizeof(T));
    return v;
  }
  static inline void store(T* to, const Vector& v, int64_t n) { std::memcpy(to, &v, ALL ? sizeof v : n * sizeof(T)); }
};

// Calls run<W, ALL>(channel, n) over channels [begin, end), in vectors of 64 bytes and, at the end, of 32.
template <typename T, typename Run>
inline void for_channels(int64_t begin, int64_t end, Run run) {
  constexpr int W = 64 / sizeof(T), H = W / 2;
  int64_t c = begin;
  for (; c + W <= end; c += W) run.template operator()<W, true>(c, W);
  const int64_t rest = end - c;
  if (rest > H) run.template operator()<W, false>(c, rest);
  else if (rest == H) run.template operator()<H, true>(c, H);
  else if (rest > 0) run.template operator()<H, false>(c, rest);
}
