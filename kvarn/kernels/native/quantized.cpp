// The loops of quantized.h, and their C interface.
#include "quantized.h"

namespace kvarn {

// codes [n, k] with values 0 to 15 (4 bits) or 0 to 255, scale and offset [n, k / 32] as halves.
inline void pack_codes(const Codes& made, const uint8_t* codes, const uint16_t* scale,
                       const uint16_t* offset, uint8_t* out) {
    const int64_t groups = made.k / GROUP, panels = (made.n + PANEL - 1) / PANEL;
    huge_pages(out, panels * made.panel());
#pragma omp parallel for
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t g = 0; g < groups; g++) {
            uint8_t* to = out + panel * made.panel() + g * made.block();
            std::memset(to, 0, made.block());
            uint16_t* factors = (uint16_t*)(to + GROUP / 8 * made.bits * PANEL);
            for (int64_t j = 0; j < PANEL && panel * PANEL + j < made.n; j++) {
                const int64_t row = panel * PANEL + j;
                for (int64_t i = 0; i < GROUP; i++) {
                    const uint8_t code = codes[row * made.k + g * GROUP + i];
                    if (made.bits == 8) to[(i / 4 * PANEL + j) * 4 + i % 4] = code;
                    else to[(i / 8 * PANEL + j) * 4 + i % 4] |= code << (i / 4 % 2 * 4);
                }
                factors[j] = scale[row * groups + g];
                if (made.offsets) factors[PANEL + j] = offset[row * groups + g];
            }
        }
}

constexpr int SUMS = WIDTH / LANES;

// Codes of some inputs, good for `per` dot products, against M rows.
template <int M, int BITS>
inline void add_products(Ints (&acc)[M][SUMS], const uint32_t* const (&x)[M], const uint8_t* codes, int p) {
    constexpr int per = BITS == 8 ? 1 : 2;
    Words column[SUMS];
#pragma GCC unroll 4
    for (int j = 0; j < SUMS; j++) column[j] = load<Words>(codes + (p * PANEL + j * LANES) * 4);
#pragma GCC unroll 2
    for (int part = 0; part < per; part++) {
        Words now[SUMS];
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++)
            now[j] = per == 1 ? column[j] : column[j] >> (4 * part) & 0x0f0f0f0fu;
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const Words row = Words{} + x[i][p * per + part];
#pragma GCC unroll 4
            for (int j = 0; j < SUMS; j++) acc[i][j] = dot4<BITS>(acc[i][j], now[j], row);
        }
    }
}

// The products of a block. Where `dot4` takes many instructions, a loop over them is as fast as all of
// them in a row for four rows of x or more, and takes the compiler a third of the time.
template <int M, int BITS>
inline void block_sums(Ints (&acc)[M][SUMS], const uint32_t* const (&x)[M], const uint8_t* codes) {
    constexpr int vectors = GROUP / 4 / (BITS == 8 ? 1 : 2);
    if constexpr (M < 4 || DOT4_IS_SHORT) {
#pragma GCC unroll 8
        for (int p = 0; p < vectors; p++) add_products<M, BITS>(acc, x, codes, p);
    } else {
#pragma GCC unroll 1
        for (int p = 0; p < vectors; p++) add_products<M, BITS>(acc, x, codes, p);
    }
}

// The sums of M rows of x from `row` against WIDTH outputs of a panel, from `at` on.
template <int M, int BITS, bool OFFSETS>
inline void quantised_held(const Codes& w, const uint8_t* panel, const Quantised& x, int64_t row, int at,
                           const uint8_t* ahead, Floats (*out)[VECTORS]) {
    const int64_t groups = w.k / GROUP, block = w.block();
    Floats acc[M][SUMS];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < SUMS; j++) acc[i][j] = Floats{};
    for (int64_t g = 0; g < groups; g++, panel += block) {
        if (ahead)
            for (int64_t i = 0; i < block; i += 128) __builtin_prefetch(ahead + g * block + i, 0, 2);
        Ints sums[M][SUMS];
        const uint32_t* codes[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            codes[i] = (const uint32_t*)(x.codes + (row + i) * w.k + g * GROUP);
#pragma GCC unroll 4
            for (int j = 0; j < SUMS; j++)
                sums[i][j] = Ints{} - ((int32_t)w.zero - LESS<BITS>) * x.total[(row + i) * groups + g];
        }
        block_sums<M, BITS>(sums, codes, panel + at * 4);
        const uint16_t* factors = (const uint16_t*)(panel + GROUP / 8 * BITS * PANEL) + at;
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++) {
            const Floats scale = from_half(load<Halves>(factors + j * LANES));
            Floats offset;
            if (OFFSETS) offset = from_half(load<Halves>(factors + PANEL + j * LANES));
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                const int64_t group = (row + i) * groups + g;
                acc[i][j] = fma(to_float(sums[i][j]), scale * x.scale[group], acc[i][j]);
                if (OFFSETS) acc[i][j] = fma(offset, splat(x.shift[group]), acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < SUMS; j++) out[i][at / LANES + j] = acc[i][j];
}

template <int M, int BITS, bool OFFSETS>
void quantised_tile(const Codes& w, const uint8_t* panel, const Quantised& x, int64_t row,
                    const uint8_t* ahead, Floats (*out)[VECTORS]) {
    for (int at = 0; at < PANEL; at += WIDTH)
        quantised_held<M, BITS, OFFSETS>(w, panel, x, row, at, at ? nullptr : ahead, out);
}

using QuantisedTile = void (*)(const Codes&, const uint8_t*, const Quantised&, int64_t, const uint8_t*,
                               Floats (*)[VECTORS]);

template <int BITS, bool OFFSETS>
constexpr QuantisedTile QUANTISED_TILES[QUANTISED_ROWS + 1] = {
    nullptr,
    quantised_tile<1, BITS, OFFSETS>, quantised_tile<2, BITS, OFFSETS>,
    quantised_tile<3, BITS, OFFSETS>, quantised_tile<4, BITS, OFFSETS>,
    quantised_tile<5, BITS, OFFSETS>, quantised_tile<6, BITS, OFFSETS>,
};

inline const QuantisedTile* tiles_of(const Codes& w) {
    if (w.bits == 8) return w.offsets ? QUANTISED_TILES<8, true> : QUANTISED_TILES<8, false>;
    return w.offsets ? QUANTISED_TILES<4, true> : QUANTISED_TILES<4, false>;
}

template <class U>
void quantised_panel(const Codes& w, const Quantised& x, int64_t lo, int64_t hi, int64_t at,
                     const float* bias, U* y, int64_t y_stride, bool bring) {
    const uint8_t* panel = w.blocks + at / PANEL * w.panel();
    const int64_t tiles = (hi - lo + QUANTISED_ROWS - 1) / QUANTISED_ROWS;
    const QuantisedTile* tile = tiles_of(w);
    Floats sums[QUANTISED_ROWS][VECTORS];
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t from = lo + (hi - lo) * i / tiles, to = lo + (hi - lo) * (i + 1) / tiles;
        const uint8_t* ahead = bring && tiles > 1 && i < 2 ? panel + w.panel() + 64 * i : nullptr;
        tile[to - from](w, panel, x, from, ahead, sums);
        put_tile(sums, (int)(to - from), bias ? bias + at : nullptr, w.n - at, y + from * y_stride,
                 y_stride);
    }
}

template void quantised_panel(const Codes&, const Quantised&, int64_t, int64_t, int64_t, const float*,
                              float*, int64_t, bool);
template void quantised_panel(const Codes&, const Quantised&, int64_t, int64_t, int64_t, const float*,
                              bf16*, int64_t, bool);

template <class T>
void quantise(const T* x, int64_t t, int64_t k, int64_t x_stride, const Quantised& to) {
#pragma omp parallel for if (t * k > 65536)
    for (int64_t row = 0; row < t; row++) quantise_row(x + row * x_stride, k, row, to);
}

template <class T, class U>
void run_quantised(const Codes& w, const T* x, int64_t t, int64_t x_stride, const Quantised& space,
                   const float* bias, U* y) {
    const int64_t panels = (w.n + PANEL - 1) / PANEL, chunks = (t + CHUNK - 1) / CHUNK;
    if (t == 0) return;
    quantise(x, t, w.k, x_stride, space);
#pragma omp parallel for schedule(static) collapse(2) if (w.n * w.k * t > 30000)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t panel = 0; panel < panels; panel++)
            quantised_panel(w, space, t * chunk / chunks, t * (chunk + 1) / chunks, panel * PANEL, bias,
                            y + panel * PANEL, w.n, chunk == 0 && panel + 1 < panels);
}

}  // namespace kvarn

using kvarn::bf16;
using kvarn::Codes;
using kvarn::Quantised;

#define KVARN_FORMS(suffix, T)                                                                        \
    void kvarn_quantised_##suffix(const Codes* w, const T* x, int64_t t, int64_t x_stride,            \
                                  const Quantised* space, const float* bias, T* y) {                  \
        kvarn::run_quantised(*w, x, t, x_stride, *space, bias, y);                                    \
    }                                                                                                 \
    void kvarn_quantised_wide_##suffix(const Codes* w, const T* x, int64_t t, int64_t x_stride,       \
                                       const Quantised* space, const float* bias, float* y) {         \
        kvarn::run_quantised(*w, x, t, x_stride, *space, bias, y);                                    \
    }

extern "C" {
KVARN_FORMS(f32, float)
KVARN_FORMS(bf16, bf16)

void kvarn_pack_codes(const Codes* w, const uint8_t* codes, const uint16_t* scale,
                      const uint16_t* offset, uint8_t* out) {
    kvarn::pack_codes(*w, codes, scale, offset, out);
}
}
