// Vectors over neighbouring channels, in the compilers' own vector types (GCC, Clang).

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

// Of a vector register. Wider vectors would be split, and spilled: the kernels count on 16 registers.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

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

// Zeros, beginning with a cache line: vectors across two lines load at half the speed, and threads that write beside each
// other take lines from each other.
template <typename T>
class Zeros {
  static constexpr size_t LINE = 64 / sizeof(T);
  std::vector<T> memory;

 public:
  explicit Zeros(size_t size) : memory(size + LINE, T(0)) {}
  T* data() { return memory.data() + (LINE - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(T) % LINE) % LINE; }
};

// Calls run<W, ALL>(channel, n) over channels [begin, end), in whole vectors and, at the end, a half or a partial one.
template <typename T, typename Run>
inline void for_channels(int64_t begin, int64_t end, Run run) {
  constexpr int W = VECTOR_BYTES / sizeof(T), H = W / 2;
  int64_t c = begin;
  for (; c + W <= end; c += W) run.template operator()<W, true>(c, W);
  const int64_t rest = end - c;
  if (rest > H) run.template operator()<W, false>(c, rest);
  else if (rest == H) run.template operator()<H, true>(c, H);
  else if (rest > 0) run.template operator()<H, false>(c, rest);
}
