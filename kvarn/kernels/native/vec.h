// Lanes of 32 bits, as many as a register has, in the compiler's own vector types: one source for AVX-512,
// AVX2 and NEON. Wider vectors would be kept in memory.
// A bf16 matrix is handled as dwords of two neighbours along the summed dimension, so that fp32 and bf16
// run through the same loops: `mac` is a fused multiply-add on one, a dot product of pairs on the other.
// Where there is no such product, several rows are widened to floats first, a block of words at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvarn {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define KVARN_AVX2
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Sums of a product that are held in registers at a time: rows, and columns.
constexpr int HELD_ROWS = LANES == 16 ? 12 : 6, HELD_COLUMNS = LANES == 16 ? 64 : 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct bf16 {
    uint16_t bits;
};

template <class V, class P>
inline V load(const P* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class P>
inline void store(P* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

inline Floats splat(float x) { return x - Floats{}; }  // no sum: that would be computed, for -0

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(KVARN_AVX2)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline Floats select(Ints mask, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Lanes moved by half of them, a quarter, and so on: sums and maxima run in this fixed tree.
template <int N, int... I>
inline Floats turned(Floats v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ N)...);
}

template <int N>
inline Floats turned(Floats v) {
    return turned<N>(v, std::make_integer_sequence<int, LANES>());
}

template <int N = LANES / 2>
inline float sum(Floats v) {
    v = v + turned<N>(v);
    if constexpr (N > 1) return sum<N / 2>(v);
    return v[0];
}

template <int N = LANES / 2>
inline float largest(Floats v) {
    v = larger(v, turned<N>(v));
    if constexpr (N > 1) return largest<N / 2>(v);
    return v[0];
}

inline Floats widen(Halves h) {
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}

// Round to nearest even; NaN stays NaN.
inline Halves narrow(Floats v) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
    Words u = (Words)v;
    Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    Words quiet = (u >> 16) | 0x40;
    Ints nan = v != v;
    return __builtin_convertvector((rounded & ~(Words)nan) | (quiet & (Words)nan), Halves);
#endif
}

template <class T>
struct Lane;

template <>
struct Lane<float> {
    static constexpr int per_word = 1;
    static constexpr bool paired = true;
    static Floats get(const float* p) { return load<Floats>(p); }
    static void put(float* p, Floats v) { store(p, v); }
    static Floats mac(Floats acc, Words a, Words b) { return fma((Floats)a, (Floats)b, acc); }
};

template <>
struct Lane<bf16> {
    static constexpr int per_word = 2;
#if defined(__AVX512BF16__)
    static constexpr bool paired = true;  // a word is one operand
#else
    static constexpr bool paired = false;
#endif
    static Floats get(const bf16* p) { return widen(load<Halves>(p)); }
    static void put(bf16* p, Floats v) { store(p, narrow(v)); }
    static Floats mac(Floats acc, Words a, Words b) {
#if defined(__AVX512BF16__)
        return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
        acc = fma((Floats)(a << 16), (Floats)(b << 16), acc);
        return fma((Floats)(a & 0xffff0000u), (Floats)(b & 0xffff0000u), acc);
#endif
    }
};

#if defined(__AVX512VNNI__)
constexpr bool DOT4_IS_SHORT = true;  // one instruction
#else
constexpr bool DOT4_IS_SHORT = false;
#endif

// What `dot4` takes from codes of BITS first: signs spare AVX2, whose sums of two products have 16 bits.
#if defined(KVARN_AVX2)
template <int BITS>
constexpr int LESS = BITS == 8 ? 128 : 0;
#else
template <int BITS>
constexpr int LESS = 0;
#endif

// acc + a0*b0 + .. + a3*b3 of the four bytes of each lane: a of BITS without a sign, b from -127 to 127.
template <int BITS>
inline Ints dot4(Ints acc, Words a, Words b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(KVARN_AVX2)
    __m256i size = (__m256i)a, factor = (__m256i)b;
    if constexpr (LESS<BITS> > 0) {
        const __m256i centred = (__m256i)(a ^ 0x80808080u);
        size = _mm256_abs_epi8(centred), factor = _mm256_sign_epi8(factor, centred);
    }
    const __m256i pairs = _mm256_maddubs_epi16(size, factor);
    return acc + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; byte++)
        acc += (Ints)(a >> (8 * byte) & 0xff) * ((Ints)(b << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

// IEEE half precision, exactly.
inline Floats from_half(Halves h) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)h);
#elif defined(KVARN_AVX2)
    return (Floats)_mm256_cvtph_ps((__m128i)h);
#else
    const Words wide = __builtin_convertvector(h, Words);
    const Floats size = (Floats)((wide & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
    return (Floats)((Words)size | (wide & 0x8000) << 16);
#endif
}

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

// The first n < LANES elements, the rest zero.
template <class T>
inline Floats get_some(const T* p, int n) {
    T part[LANES] = {};
    std::memcpy(part, p, n * sizeof(T));
    return Lane<T>::get(part);
}

template <class T>
inline void put_some(T* p, Floats v, int n) {
    T part[LANES];
    Lane<T>::put(part, v);
    std::memcpy(p, part, n * sizeof(T));
}

// 2^x; 0 below -126, infinity from 128 on. Error under 2 units in the last place.
inline Floats exp2(Floats x) {
    x = larger(x, splat(-127.0f));
    x = x > splat(128.0f) ? splat(128.0f) : x;
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats shifted = x + magic;
    Floats f = x - (shifted - magic);
    Ints n = (Ints)shifted - (Ints)magic;
    Floats p = splat(1.5403530e-4f);
    p = fma(p, f, splat(1.3333558e-3f));
    p = fma(p, f, splat(9.6181291e-3f));
    p = fma(p, f, splat(5.5504109e-2f));
    p = fma(p, f, splat(2.4022651e-1f));
    p = fma(p, f, splat(6.9314718e-1f));
    p = fma(p, f, splat(1.0f));
    Floats r = (Floats)((Ints)p + (n << 23));
    return select(x > splat(-126.0f), r, Floats{});
}

constexpr float LOG2E = 1.44269504088896341f;
constexpr float LN2 = 0.693147180559945309f;

inline Floats exp(Floats x) { return exp2(x * LOG2E); }

inline Floats tanh(Floats x) {
    Floats sq = x * x;
    Floats small = x * fma(fma(fma(splat(-17.0f / 315), sq, splat(2.0f / 15)), sq, splat(-1.0f / 3)),
                           sq, splat(1.0f));
    Floats bound = select(x > splat(20.0f), splat(20.0f), x);
    Floats wide = 1.0f - 2.0f / (exp2(bound * (2.0f * LOG2E)) + 1.0f);
    return select(sq < splat(0.04f), small, wide);
}

constexpr int64_t BLOCK = 256;  // words of a row that are widened at a time

// floats[2 n] = the n words of a row
inline void widen_words(const uint32_t* words, int64_t n, float* floats) {
    const bf16* from = (const bf16*)words;
    int64_t i = 0;
    for (; i + LANES <= 2 * n; i += LANES) store(floats + i, Lane<bf16>::get(from + i));
    if (i < 2 * n) store(floats + i, get_some(from + i, (int)(2 * n - i)));
}

// The part of `multiply` from `row` and `column` on, as large as registers can hold.
template <class T, int ROWS, int COLUMNS, bool AHEAD, int M, int N>
inline void multiply_held(Floats (&acc)[M][N], int row, int column, const uint32_t* const (&a)[M],
                          const uint32_t* b, int64_t b_stride, int64_t k, const uint32_t* ahead) {
    constexpr bool widened = !Lane<T>::paired && ROWS > 4;  // else it is not worth its time
    Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) sums[i][j] = acc[row + i][column + j];
    const int64_t block = widened ? BLOCK : k;
    for (int64_t first = 0; first < k; first += block) {
        const int64_t end = first + block < k ? first + block : k;
        float floats[ROWS][widened ? 2 * BLOCK + LANES : 1];
        if constexpr (widened)
            for (int i = 0; i < ROWS; i++) widen_words(a[row + i] + first, end - first, floats[i]);
        for (int64_t p = first; p < end; p++) {
            if (AHEAD) __builtin_prefetch(ahead + p * 32, 0, 2);
            Words held[COLUMNS];
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++)
                held[j] = load<Words>(b + p * b_stride + (column + j) * LANES);
            if constexpr (widened) {
                const int64_t at = 2 * (p - first);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
                    for (int j = 0; j < COLUMNS; j++)
                        sums[i][j] = fma(splat(floats[i][at]), (Floats)(held[j] << 16), sums[i][j]);
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
                    for (int j = 0; j < COLUMNS; j++)
                        sums[i][j] = fma(splat(floats[i][at + 1]), (Floats)(held[j] & 0xffff0000u),
                                         sums[i][j]);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < ROWS; i++) {
                    const Words factor = Words{} + a[row + i][p];
#pragma GCC unroll 8
                    for (int j = 0; j < COLUMNS; j++)
                        sums[i][j] = Lane<T>::mac(sums[i][j], factor, held[j]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) acc[row + i][column + j] = sums[i][j];
}

// acc[M][N] += A[M][k] B[k][N * LANES], k in words. Every element is summed in order of k by one chain, so
// the result for a row does not depend on M. `ahead`, where given, is brought into the cache on the way,
// every second line of 64 bytes of it.
template <class T, int M, int N, bool AHEAD = false>
inline void multiply(Floats (&acc)[M][N], const uint32_t* const (&a)[M], const uint32_t* b,
                     int64_t b_stride, int64_t k, const uint32_t* ahead = nullptr) {
    constexpr int rows = M < HELD_ROWS ? M : HELD_ROWS;
    constexpr int columns = N * LANES < HELD_COLUMNS ? N : HELD_COLUMNS / LANES;
    static_assert(N % columns == 0 && M <= 2 * HELD_ROWS);
    multiply_held<T, rows, columns, AHEAD>(acc, 0, 0, a, b, b_stride, k, ahead);
    for (int j = columns; j < N; j += columns)
        multiply_held<T, rows, columns, false>(acc, 0, j, a, b, b_stride, k, nullptr);
    if constexpr (M > rows)
        for (int j = 0; j < N; j += columns)
            multiply_held<T, M - rows, columns, false>(acc, rows, j, a, b, b_stride, k, nullptr);
}

}  // namespace kvarn
