// The loops of attention.h, and their C interface.
#include <cmath>

#include "attention.h"

namespace kvarn {

constexpr int STEP = 6;  // rows multiplied at a time
constexpr int ACROSS = TILE / LANES;  // vectors of a row's scores, and of 64 columns of values

// to[p][j] = from[j][p] for 16 rows of words.
inline void transpose(const uint32_t* const* from, int64_t words, uint32_t* to) {
    for (int64_t first = 0; first < words; first += 16) {
        const int64_t n = std::min<int64_t>(16, words - first);
#if defined(__AVX512F__)
        __m512i r[16], t[16];
        const __mmask16 some = (__mmask16)((1u << n) - 1);
        for (int i = 0; i < 16; i++) r[i] = _mm512_maskz_loadu_epi32(some, from[i] + first);
        for (int i = 0; i < 8; i++) {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 4; i++)
            for (int h = 0; h < 2; h++) {
                r[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
                r[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
            }
        for (int c = 0; c < 4; c++) {
            t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
            t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
            t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
            t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        }
        for (int c = 0; c < 4; c++) {
            r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
            r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
            r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
            r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
        }
#pragma GCC unroll 16
        for (int p = 0; p < 16; p++)
            if (p < n) _mm512_storeu_si512(to + (first + p) * TILE, r[p]);
#else
        for (int64_t p = 0; p < n; p++)
            for (int i = 0; i < 16; i++) to[(first + p) * TILE + i] = from[i][first + p];
#endif
    }
}

// Values as `multiply` wants them: fp32 rows as they are, bf16 rows two and two, interleaved.
inline void lay_values(const float* const* from, int64_t n, int64_t dim, int64_t wide, uint32_t* to) {
    for (int64_t j = 0; j < n; j++) std::memcpy(to + j * wide, from[j], dim * 4);
}

inline void interleave(Halves low, Halves high, uint32_t* to) {
    store(to, __builtin_convertvector(low, Words) | (__builtin_convertvector(high, Words) << 16));
}

inline void lay_values(const bf16* const* from, int64_t n, int64_t dim, int64_t wide, uint32_t* to) {
    for (int64_t j = 0; j < n; j += 2) {
        uint32_t* row = to + j / 2 * wide;
        int64_t i = 0;
        for (; i + LANES <= dim; i += LANES)
            interleave(load<Halves>(from[j] + i), load<Halves>(from[j + 1] + i), row + i);
        if (i < dim) {
            Halves low = {}, high = {};
            std::memcpy(&low, from[j] + i, (dim - i) * 2);
            std::memcpy(&high, from[j + 1] + i, (dim - i) * 2);
            interleave(low, high, row + i);
        }
    }
}

inline void put_weights(float* to, Floats p) { store(to, p); }
inline void put_weights(bf16* to, Floats p) { Lane<bf16>::put(to, p); }

// One row's scores of one tile become weights; the running state is brought to the new peak.
// `low` and `high` bound the visible columns. Peak and total are in base 2.
template <class T>
__attribute__((noinline)) void soften(const Step& step, float* scores, int64_t low, int64_t high,
                                      T* weights, float* o, int64_t wide, float& peak, float& total) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    Floats s[ACROSS], top = splat(-INFINITY);
    for (int c = 0; c < ACROSS; c++) {
        s[c] = load<Floats>(scores + c * LANES) * step.scale;
        if (step.softcap > 0) s[c] = tanh(s[c] * (1.0f / step.softcap)) * step.softcap;
        s[c] = s[c] * LOG2E;
        if (low > 0 || high < TILE) {
            const Ints at = lane + c * LANES;
            s[c] = select((at >= (int)low) & (at < (int)high), s[c], splat(-INFINITY));
        }
        top = larger(top, s[c]);
    }
    const float now = std::max(peak, largest(top));
    Floats added = {};
    for (int c = 0; c < ACROSS; c++) {
        const Floats p = exp2(s[c] - now);
        added = added + p;
        put_weights(weights + c * LANES, p);
    }
    if (now > peak) {
        const float shrink = exp2(splat(peak - now))[0];
        total *= shrink;
        for (int64_t i = 0; i < wide; i += LANES) store(o + i, load<Floats>(o + i) * shrink);
        peak = now;
    }
    total += sum(added);
}

template <class T, int M>
void score_rows(const Scratch<T>& s, int64_t row) {
    Floats acc[M][ACROSS];
    const uint32_t* a[M];
    for (int i = 0; i < M; i++) {
        a[i] = s.q.get() + (row + i) * s.words;
        for (int j = 0; j < ACROSS; j++) acc[i][j] = Floats{};
    }
    multiply<T, M, ACROSS>(acc, a, s.keys.get(), TILE, s.words);
    float* scores = s.scores.get() + row * TILE;
    for (int i = 0; i < M; i++)
        for (int j = 0; j < ACROSS; j++) store(scores + i * TILE + j * LANES, acc[i][j]);
}

template <class T, int M>
void weigh_rows(const Scratch<T>& s, int64_t row, int64_t k) {
    const uint32_t* a[M];
    for (int i = 0; i < M; i++) a[i] = s.weights.get() + (row + i) * (TILE / Lane<T>::per_word);
    for (int64_t first = 0; first < s.wide; first += 64) {
        Floats acc[M][ACROSS];
        float* o = s.o.get() + row * s.wide + first;
        for (int i = 0; i < M; i++)
            for (int j = 0; j < ACROSS; j++) acc[i][j] = load<Floats>(o + i * s.wide + j * LANES);
        multiply<T, M, ACROSS>(acc, a, s.values.get() + first, s.wide, k);
        for (int i = 0; i < M; i++)
            for (int j = 0; j < ACROSS; j++) store(o + i * s.wide + j * LANES, acc[i][j]);
    }
}

template <class T>
void score(const Scratch<T>& s, int64_t row, int64_t n) {
    switch (n) {
        case 1: return score_rows<T, 1>(s, row);
        case 2: return score_rows<T, 2>(s, row);
        case 3: return score_rows<T, 3>(s, row);
        case 4: return score_rows<T, 4>(s, row);
        case 5: return score_rows<T, 5>(s, row);
        default: return score_rows<T, 6>(s, row);
    }
}

template <class T>
void weigh(const Scratch<T>& s, int64_t row, int64_t n, int64_t k) {
    switch (n) {
        case 1: return weigh_rows<T, 1>(s, row, k);
        case 2: return weigh_rows<T, 2>(s, row, k);
        case 3: return weigh_rows<T, 3>(s, row, k);
        case 4: return weigh_rows<T, 4>(s, row, k);
        case 5: return weigh_rows<T, 5>(s, row, k);
        default: return weigh_rows<T, 6>(s, row, k);
    }
}

inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < std::min<int64_t>(bytes, 1 << 14); i += 64)
        __builtin_prefetch((const char*)from + i, 0, 2);
}

// Keys and values of positions [first, first + TILE) that lie in [low, high), laid out; zero elsewhere.
// Values behind `high` are left out: returns the number of words of `weights` that have values.
template <class T>
int64_t gather(const Step& step, const T* cache, int64_t span, int64_t head, int64_t first,
               int64_t low, int64_t high, const Scratch<T>& s) {
    const int64_t* pages = step.pages + step.page_indptr[span];
    const int64_t plane = step.page_size * step.dim;
    const T* keys[TILE];
    const T* values[TILE];
    const T* zero = (const T*)s.zero.get();
    for (int64_t j = 0; j < TILE; j++) keys[j] = values[j] = zero;
    const int64_t begin = std::max(first, low), end = std::min(first + TILE, high);
    int64_t offset = begin - step.base[span];
    const int64_t* page = pages + offset / step.page_size;
    offset %= step.page_size;
    for (int64_t at = begin; at < end; page++, offset = 0) {
        const int64_t n = std::min(step.page_size - offset, end - at);
        const T* k = cache + (*page * step.kv_heads + head) * 2 * plane + offset * step.dim;
        const T* v = k + plane;
        for (int64_t i = 0; i < n; i++, at++) {
            keys[at - first] = k + i * step.dim;
            values[at - first] = v + i * step.dim;
        }
    }
    const int64_t next = std::min(first + 2 * TILE, high) - end;  // positions of the tile after this
    const int64_t* last = step.pages + step.page_indptr[span + 1];
    for (int64_t i = 0; i * step.page_size < next && page < last; i++, page++)
        prefetch(cache + (*page * step.kv_heads + head) * 2 * plane, 2 * plane * sizeof(T));
    for (int64_t j = 0; j < TILE; j += 16) transpose((const uint32_t**)keys + j, s.words, s.keys.get() + j);
    constexpr int64_t per_word = Lane<T>::per_word;
    const int64_t used = (end - first + per_word - 1) / per_word;
    lay_values(values, used * per_word, step.dim, s.wide, s.values.get());
    return used;
}

template <class T>
void attend(const Step& step, const T* cache, const T* q, int64_t q_stride, T* o, float* lse,
            int64_t span, int64_t row, int64_t n, int64_t head, Scratch<T>& s) {
    const int64_t group = step.heads / step.kv_heads, folded = n * group;
    const int64_t position = step.start[span] + row - step.indptr[span];
    for (int64_t r = 0; r < folded; r++) {
        const T* from = q + (row + r / group) * q_stride + (head * group + r % group) * step.dim;
        std::memcpy(s.q.get() + r * s.words, from, step.dim * sizeof(T));
        s.peak[r] = -INFINITY;
        s.total[r] = 0;
    }
    std::memset(s.o.get(), 0, folded * s.wide * 4);
    const int64_t low = step.window ? std::max<int64_t>(0, position - step.window + 1) : 0;
    const int64_t high = position + n;
    T* weights = (T*)s.weights.get();
    for (int64_t first = low / TILE * TILE; first < high; first += TILE) {
        const int64_t used = gather(step, cache, span, head, first, low, high, s);
        // rows that see something of this tile: from `skip` on, and with a window not past `end`
        const int64_t skip = std::max<int64_t>(0, first - position) * group;
        const int64_t past = first + TILE - 1 + step.window - position;
        const int64_t end = step.window ? std::min<int64_t>(n, past) * group : folded;
        for (int64_t r = skip; r < end; r += STEP) {
            const int64_t some = std::min<int64_t>(STEP, end - r);
            score(s, r, some);
            for (int64_t i = r; i < r + some; i++) {
                const int64_t at = position + i / group - first;
                const int64_t from = step.window ? at - step.window + 1 : 0;
                soften(step, s.scores.get() + i * TILE, from, at + 1, weights + i * TILE,
                       s.o.get() + i * s.wide, s.wide, s.peak[i], s.total[i]);
            }
            weigh(s, r, some, used);
        }
    }
    // the sinks that are behind a row's window; every row has a finite peak by now
    const int64_t behind = step.sinks ? std::min(step.sinks, high - step.window) : 0;
    for (int64_t first = 0; first < behind; first += TILE) {
        const int64_t used = gather(step, cache, span, head, first, 0, behind, s);
        const int64_t skip = std::max<int64_t>(0, first + step.window - position) * group;
        for (int64_t r = skip; r < folded; r += STEP) {
            const int64_t some = std::min<int64_t>(STEP, folded - r);
            score(s, r, some);
            for (int64_t i = r; i < r + some; i++) {
                const int64_t left = position + i / group - step.window + 1;
                soften(step, s.scores.get() + i * TILE, 0, std::min(behind, left) - first,
                       weights + i * TILE, s.o.get() + i * s.wide, s.wide, s.peak[i], s.total[i]);
            }
            weigh(s, r, some, used);
        }
    }
    for (int64_t r = 0; r < folded; r++) {
        const int64_t to = (row + r / group) * step.heads + head * group + r % group;
        const float scale = 1.0f / s.total[r];
        for (int64_t i = 0; i < step.dim; i += LANES) {
            const Floats v = load<Floats>(s.o.get() + r * s.wide + i) * scale;
            const int64_t left = step.dim - i;
            if (left >= LANES) Lane<T>::put(o + to * step.dim + i, v);
            else put_some(o + to * step.dim + i, v, (int)left);
        }
        if (lse) lse[to] = (s.peak[r] + std::log2(s.total[r])) * LN2;
    }
}

template void attend(const Step&, const float*, const float*, int64_t, float*, float*, int64_t, int64_t,
                     int64_t, int64_t, Scratch<float>&);
template void attend(const Step&, const bf16*, const bf16*, int64_t, bf16*, float*, int64_t, int64_t,
                     int64_t, int64_t, Scratch<bf16>&);

constexpr int64_t SERIAL = 100000;  // products below which a second thread costs more than it brings

// All rows are written before any row attends: spans may see each other's pages.
template <class T>
void run(const Step& step, T* cache, const T* q, const T* k, const T* v, int64_t q_stride,
         int64_t k_stride, int64_t v_stride, T* o, float* lse) {
    const int64_t group = step.heads / step.kv_heads;
    int64_t tallest = 1, cost = 0;
    for (int64_t i = 0; i < step.items; i++) {
        const int64_t* item = step.work + i * 3;
        tallest = std::max(tallest, item[2]);
        cost += (step.start[item[0]] + item[1] - step.indptr[item[0]] + item[2]) * item[2];
    }
    const bool wide = cost * step.heads * step.dim > SERIAL;
#pragma omp parallel if (wide)
    {
#pragma omp for
        for (int64_t row = 0; row < step.rows; row++)
            append(step, cache, k, v, k_stride, v_stride, row);
        Scratch<T> scratch(tallest * group, step.dim);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < step.items * step.kv_heads; i++) {
            const int64_t* item = step.work + i / step.kv_heads * 3;
            attend(step, cache, q, q_stride, o, lse, item[0], item[1], item[2], i % step.kv_heads,
                   scratch);
        }
    }
}

}  // namespace kvarn

extern "C" {

using kvarn::bf16;

void kvarn_attention_f32(const kvarn::Step* step, float* cache, const float* q, const float* k,
                         const float* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, float* o,
                         float* lse) {
    kvarn::run(*step, cache, q, k, v, q_stride, k_stride, v_stride, o, lse);
}

void kvarn_attention_bf16(const kvarn::Step* step, bf16* cache, const bf16* q, const bf16* k,
                          const bf16* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, bf16* o,
                          float* lse) {
    kvarn::run(*step, cache, q, k, v, q_stride, k_stride, v_stride, o, lse);
}
}
