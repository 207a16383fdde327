// Quantized linear layers on x86 CPUs with AVX512 F/BW/VL/DQ/VBMI/VNNI/BF16 (Zen 4 and later, Sapphire Rapids and later).
//
//   y[M, N] = x[M, K] @ w[N, K]^T + bias[N],    w[n, k] = w_q[n, k] * scale[g, n] + offset[g, n],    g = k / group
//
// linear_weight_only: x bf16 (vdpbf16ps), or x float32 / float16 (fp32 FMA); float32 accumulation.
// linear_dynamic:     x ~ (x_q - x_zp) * x_scale with x_q int8 (vpdpbusd); exact int32 accumulation inside a group.
//
// One loop serves all of them. A tile is MR <= 6 rows by 64 columns, its 4 * MR accumulators stay in registers, and every step reads one piece
// of each row of x (broadcast) and one row of packed weights, decoded in registers. Decoding runs on the vector ports that the dot products leave
// free, so few rows decode weights again for every tile. Many rows of bf16 read a panel of bf16 weights that is written once per block of rows:
// scaled where there are groups, whose scales cost a tile a multiplication per group and accumulator. What differs is in the "kinds": BF16x,
// FP32xInt, I8xInt.
//
// Packed weights, from packing_cpu.py: [n_pad / 64][k_pad / KStep] rows of Decode::Bytes bytes, n_pad = round_up(N, 64), k_pad = G * group when
// G > 1, else round_up(K, KStep). scale and offset: [G, n_pad]. The decoders below are the definition of a row. M >= 0, N >= 1, K >= 1; x, bias
// and y are not padded and nothing outside their rows is touched. A row of x with an infinity may give NaN where the exact result is infinite.
//
// Needs -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mavx512bf16; threads > 1 needs -fopenmp. Safe under -ffast-math. The
// text may be pasted into a source file at global scope: everything has internal linkage.
#ifndef AOQUANT_CPU_LINEAR_H
#define AOQUANT_CPU_LINEAR_H
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define AOQUANT_INLINE inline __attribute__((always_inline))

namespace aoquant {
namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// ---- element types of y and bias: 16 lanes under a mask ---------------------------------------------------------------------------------------

inline __m512 load16(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline __m512 load16(const f16* p, __mmask16 lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }
inline __m512 load16(const bf16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}
inline void store16(float* p, __mmask16 lanes, __m512 v) { _mm512_mask_storeu_ps(p, lanes, v); }
inline void store16(f16* p, __mmask16 lanes, __m512 v) {
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store16(bf16* p, __mmask16 lanes, __m512 v) { _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v)); }

inline __mmask16 lanes16(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
inline __m512i broadcast4(const void* p) { int32_t v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- tables of the decoders --------------------------------------------------------------------------------------------------------------------

// int8 -> bf16: a byte holds sign(q) << 7 | k with k = q >= 0 ? q : ~q, and decodes to q + 0.5 = +-(k + 0.5), which has 8 significant bits and so
// is exact in bf16 over all of [-128, 127]. vpermi2b looks up the two bytes of k + 0.5; the 0.5 is taken back through the row sums of x.
struct Int8Table {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
  constexpr Int8Table() : low(), high() {
    for (int k = 0; k < 128; ++k) {
      int odd = 2 * k + 1, e = 0;
      while (odd >> (e + 1)) ++e;
      int bits = ((126 + e) << 7) | ((odd << (7 - e)) & 0x7F);
      low[k] = (uint8_t)bits;
      high[k] = (uint8_t)(bits >> 8);
    }
  }
};
// int4 -> bf16: a nibble holds q + 8. vpermw indexes by 5 bits, the fifth belongs to the next nibble: hence the table twice.
struct Int4Table {
  alignas(64) uint16_t value[32];
  constexpr Int4Table() : value() {
    for (int i = 0; i < 32; ++i) {
      int q = (i & 15) - 8, a = q < 0 ? -q : q, e = 0;
      while (a >> (e + 1)) ++e;
      value[i] = a == 0 ? 0 : (uint16_t)((q < 0 ? 0x8000 : 0) | (127 + e) << 7 | ((a << (7 - e)) & 0x7F));
    }
  }
};
constexpr Int8Table kInt8Table;
constexpr Int4Table kInt4Table;

// ---- decoders: one packed row -> b[0..3], b[j] = columns 16 j .. 16 j + 15, each a 32-bit lane of KStep values; pair<I> gives b[2 I], b[2 I + 1] -----

template <int Bits> struct DecodeBF16;  // lanes of two bf16: k, k + 1

template <> struct DecodeBF16<8> {
  static constexpr int Bits = 8, Bytes = 128;
  static constexpr float Bias = 0.5f;  // decoded value - q
  const __m512i low0 = _mm512_load_si512(kInt8Table.low), low1 = _mm512_load_si512(kInt8Table.low + 64);
  const __m512i high0 = _mm512_load_si512(kInt8Table.high), high1 = _mm512_load_si512(kInt8Table.high + 64);
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  template <int I> AOQUANT_INLINE void pair(const uint8_t* p, __m512i* b) const {
    const __m512i code = _mm512_loadu_si512(p + 64 * I);
    const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high0, code, high1), code, sign, 0xF8);  // high | (code & sign)
    b[0] = _mm512_unpacklo_epi8(low, high);
    b[1] = _mm512_unpackhi_epi8(low, high);
  }
};

template <> struct DecodeBF16<4> {
  static constexpr int Bits = 4, Bytes = 64;
  static constexpr float Bias = 0.0f;
  const __m512i table = _mm512_load_si512(kInt4Table.value);
  template <int I> AOQUANT_INLINE void pair(const uint8_t* p, __m512i* b) const {
    const __m512i code = _mm512_loadu_si512(p);
    b[0] = _mm512_permutexvar_epi16(I ? _mm512_srli_epi16(code, 8) : code, table);
    b[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(code, 8 * I + 4), table);
  }
};

// A panel that expand() wrote: scaled bf16, nothing left to decode.
struct DecodePanel {
  static constexpr int Bits = 16, Bytes = 256;
  static constexpr float Bias = 0.0f;
  template <int I> AOQUANT_INLINE void pair(const uint8_t* p, __m512i* b) const {
    b[0] = _mm512_loadu_si512(p + 128 * I);
    b[1] = _mm512_loadu_si512(p + 128 * I + 64);
  }
};

template <int Bits> struct DecodeU8;  // lanes of four unsigned bytes: k .. k + 3

template <> struct DecodeU8<8> {
  static constexpr int Bits = 8, Bytes = 256, Bias = 128;
  template <int I> AOQUANT_INLINE void pair(const uint8_t* p, __m512i* b) const {
    b[0] = _mm512_loadu_si512(p + 128 * I);
    b[1] = _mm512_loadu_si512(p + 128 * I + 64);
  }
};

template <> struct DecodeU8<4> {
  static constexpr int Bits = 4, Bytes = 128, Bias = 8;
  const __m512i nibble = _mm512_set1_epi8(15);
  template <int I> AOQUANT_INLINE void pair(const uint8_t* p, __m512i* b) const {
    const __m512i code = _mm512_loadu_si512(p + 64 * I);
    b[0] = _mm512_and_si512(code, nibble);
    b[1] = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
  }
};

// ---- kinds: what x is, how one step multiplies, how a row of x is summed ------------------------------------------------------------------------

template <class D> struct BF16x {
  using X = bf16;
  using Staged = bf16;
  using Sum = float;
  using Decode = D;
  using Acc = __m512;
  static constexpr bool Expands = true;
  static constexpr int KStep = 2;
  template <int NR> static AOQUANT_INLINE void dot(Acc* acc, const Staged* x, const __m512i* b) {
    const __m512i a = broadcast4(x);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)a, (__m512bh)b[j]);
  }
  static float sum(const Staged* x, int64_t n) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    __m512 s = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 32) {
      const __mmask32 lanes = n - k >= 32 ? ~0u : (1u << (n - k)) - 1;
      s = _mm512_dpbf16_ps(s, (__m512bh)_mm512_maskz_loadu_epi16(lanes, x + k), ones);
    }
    return _mm512_reduce_add_ps(s);
  }
};

template <class XT, int Bits> struct FP32xInt {  // XT float or f16; f16 is staged as float
  using X = XT;
  using Staged = float;
  using Sum = float;
  using Decode = DecodeBF16<Bits>;
  using Acc = __m512;
  static constexpr bool Expands = false;
  static constexpr int KStep = 2;
  template <int NR> static AOQUANT_INLINE void dot(Acc* acc, const Staged* x, const __m512i* b) {
    const __m512 a0 = _mm512_set1_ps(x[0]), a1 = _mm512_set1_ps(x[1]);
    const __m512i odd = _mm512_set1_epi32((int)0xFFFF0000);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      acc[j] = _mm512_fmadd_ps(a0, _mm512_castsi512_ps(_mm512_slli_epi32(b[j], 16)), acc[j]);
      acc[j] = _mm512_fmadd_ps(a1, _mm512_castsi512_ps(_mm512_and_si512(b[j], odd)), acc[j]);
    }
  }
  static float sum(const Staged* x, int64_t n) {
    __m512 s = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 16) s = _mm512_add_ps(s, load16(x + k, lanes16(n - k)));
    return _mm512_reduce_add_ps(s);
  }
};

template <int Bits> struct I8xInt {
  using X = int8_t;
  using Staged = int8_t;
  using Sum = int32_t;
  using Decode = DecodeU8<Bits>;
  using Acc = __m512i;
  static constexpr bool Expands = false;
  static constexpr int KStep = 4;
  template <int NR> static AOQUANT_INLINE void dot(Acc* acc, const Staged* x, const __m512i* b) {
    const __m512i a = broadcast4(x);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], b[j], a);
  }
  static int32_t sum(const Staged* x, int64_t n) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i s = _mm512_setzero_si512();
    for (int64_t k = 0; k < n; k += 64) {
      const __mmask64 lanes = n - k >= 64 ? ~0ull : (1ull << (n - k)) - 1;
      s = _mm512_dpbusd_epi32(s, ones, _mm512_maskz_loadu_epi8(lanes, x + k));
    }
    return _mm512_reduce_add_epi32(s);
  }
};

// float and int32 accumulators under one name
inline __m512 splat(float v) { return _mm512_set1_ps(v); }
inline __m512i splat(int32_t v) { return _mm512_set1_epi32(v); }
inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
inline __m512 load_acc(const float* t, __m512) { return _mm512_loadu_ps(t); }
inline __m512i load_acc(const float* t, __m512i) { return _mm512_loadu_si512(t); }
inline void store_acc(float* t, __m512 a) { _mm512_storeu_ps(t, a); }
inline void store_acc(float* t, __m512i a) { _mm512_storeu_si512(t, a); }
inline __m512 to_float(__m512 a) { return a; }
inline __m512 to_float(__m512i a) { return _mm512_cvtepi32_ps(a); }

constexpr int kTileRows = 6;
constexpr int kPrefetch = 2048;  // bytes ahead of the row of weights in use

// ---- the tile ----------------------------------------------------------------------------------------------------------------------------------

template <class X, class Y, class Bias> struct Linear {
  int64_t M, N, K;
  const X* x;
  int64_t ldx;
  const float* x_scale;   // [M] or null: 1
  const int32_t* x_zp;    // [M] or null: 0
  const uint8_t* w;
  const float* scale;     // [G, n_pad]
  const float* offset;    // [G, n_pad] or null: 0
  int64_t group;
  const float* w_sum;     // [n_pad], what x_zp multiplies: sum_k w_q when G = 1 (exact integers), else sum_k w_q * scale; read when x_zp is given
  const Bias* bias;       // [N] or null
  Y* y;
  int64_t ldy;

  int64_t groups() const { return group > 0 && group < K ? ceil_div(K, group) : 1; }
  int64_t n_pad() const { return ceil_div(N, 64) * 64; }
};

// What one thread keeps of a block of rows. start: what a group's accumulators start from, which undoes the decoders' bias;
// row_sum: sum of (x - zero point) over the group, as offset multiplies it. Both are [G, rows]: the rows of a tile are neighbours.
template <class Kind> struct Block {
  const typename Kind::Staged* x;
  int64_t ldx;
  typename Kind::Sum* start;
  float* row_sum;
  int64_t rows;
};

// `steps` steps from x and w: acc[chain][m][j] += x * w for MR rows and the registers First .. First + NR - 1 of the packed rows.
template <class Kind, int MR, int First, int NR, int Chains>
AOQUANT_INLINE void run_steps(typename Kind::Acc (*acc)[MR][NR], const typename Kind::Staged* x, int64_t ldx, const uint8_t* w, int64_t steps) {
  // Weights that come from memory, EPYC Zen 4, K = N = 2048, M = 4: int4 309 -> 261 us with it; int8, which streams faster: 144 -> 171 us, so not there.
  constexpr bool Prefetch = First == 0 && MR > 1 && Kind::Decode::Bits == 4;
  const typename Kind::Decode decode;
  auto step = [&](int chain) __attribute__((always_inline)) {
    __m512i b[NR];
    decode.template pair<First / 2>(w, b);
    if constexpr (NR == 4) decode.template pair<1>(w, b + 2);
    if constexpr (Prefetch) {
      _mm_prefetch((const char*)w + kPrefetch, _MM_HINT_T0);
      if constexpr (Kind::Decode::Bytes > 64) _mm_prefetch((const char*)w + kPrefetch + 64, _MM_HINT_T0);
    }
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) Kind::template dot<NR>(acc[chain][m], x + m * ldx, b);
    w += Kind::Decode::Bytes;
    x += Kind::KStep;
  };
  if constexpr (Chains == 2)
    for (; steps >= 2; steps -= 2) step(0), step(1);
  for (; steps > 0; --steps) step(0);
}

// One group: MR rows, columns n .. n + 63, steps s0 .. s1 - 1; tile holds the raw accumulators.
template <class Kind, int MR, class P>
void accumulate(const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  using Acc = typename Kind::Acc;
  constexpr int Chains = MR == 1 ? 2 : 1;  // one row alone is bound by the latency of its 4 accumulators
  Acc acc[Chains][MR][4];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc[0][m][j] = s0 ? load_acc(tile + m * 64 + j * 16, Acc{}) : Kind::Decode::Bias != 0 ? splat(blk.start[row + m]) : Acc{};
      if (Chains == 2) acc[Chains - 1][m][j] = Acc{};
    }
  run_steps<Kind, MR, 0, 4, Chains>(acc, blk.x + row * blk.ldx + s0 * Kind::KStep, blk.ldx, w, s1 - s0);
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_acc(tile + m * 64 + j * 16, Chains == 2 ? add(acc[0][m][j], acc[Chains - 1][m][j]) : acc[0][m][j]);
}

// Several groups: the registers First .. First + NR - 1 of the tile; tile holds sum_g scale * acc + offset * row_sum. Both sets of MR * NR accumulators
// stay in registers, so MR * NR <= 12.
template <class Kind, int MR, int First, int NR, class P>
void accumulate_groups(const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  using Acc = typename Kind::Acc;
  constexpr int Chains = MR == 1 ? 2 : 1;
  const int64_t n_pad = p.n_pad(), group_steps = p.group / Kind::KStep;
  __m512 out[MR][NR];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) out[m][j] = s0 ? _mm512_loadu_ps(tile + m * 64 + (First + j) * 16) : _mm512_setzero_ps();
  int64_t g = s0 / group_steps;
  const typename Kind::Staged* x = blk.x + row * blk.ldx + s0 * Kind::KStep;
  for (int64_t left = s1 - s0; left > 0; left -= group_steps, ++g, w += group_steps * Kind::Decode::Bytes, x += p.group) {
    Acc acc[Chains][MR][NR];
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        acc[0][m][j] = splat(blk.start[g * blk.rows + row + m]);
        if (Chains == 2) acc[Chains - 1][m][j] = Acc{};
      }
    run_steps<Kind, MR, First, NR, Chains>(acc, x, blk.ldx, w, std::min(group_steps, left));
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      const __m512 sc = _mm512_loadu_ps(p.scale + g * n_pad + n + (First + j) * 16);
#pragma GCC unroll 6
      for (int m = 0; m < MR; ++m) out[m][j] = _mm512_fmadd_ps(to_float(Chains == 2 ? add(acc[0][m][j], acc[Chains - 1][m][j]) : acc[0][m][j]), sc, out[m][j]);
    }
    if (p.offset)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) {
        const __m512 of = _mm512_loadu_ps(p.offset + g * n_pad + n + (First + j) * 16);
#pragma GCC unroll 6
        for (int m = 0; m < MR; ++m) out[m][j] = _mm512_fmadd_ps(splat(blk.row_sum[g * blk.rows + row + m]), of, out[m][j]);
      }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) _mm512_storeu_ps(tile + m * 64 + (First + j) * 16, out[m][j]);
}

template <class Kind, int MR, class P>
void accumulate_rows(const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  if (Kind::Decode::Bits == 16 || p.groups() == 1) {
    accumulate<Kind, MR>(p, blk, row, n, w, s0, s1, tile);
  } else if constexpr (MR <= 3) {
    accumulate_groups<Kind, MR, 0, 4>(p, blk, row, n, w, s0, s1, tile);
  } else {
    accumulate_groups<Kind, MR, 0, 2>(p, blk, row, n, w, s0, s1, tile);
    accumulate_groups<Kind, MR, 2, 2>(p, blk, row, n, w, s0, s1, tile);
  }
}

template <class Kind, class P>
void accumulate_rows(int rows, const P& p, const Block<Kind>& blk, int64_t row, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, float* tile) {
  switch (rows) {
    case 1: return accumulate_rows<Kind, 1>(p, blk, row, n, w, s0, s1, tile);
    case 2: return accumulate_rows<Kind, 2>(p, blk, row, n, w, s0, s1, tile);
    case 3: return accumulate_rows<Kind, 3>(p, blk, row, n, w, s0, s1, tile);
    case 4: return accumulate_rows<Kind, 4>(p, blk, row, n, w, s0, s1, tile);
    case 5: return accumulate_rows<Kind, 5>(p, blk, row, n, w, s0, s1, tile);
    case 6: return accumulate_rows<Kind, 6>(p, blk, row, n, w, s0, s1, tile);
  }
}

// tile -> y: the scale of the only group, the scale of x, bias, rounding.
template <class Kind, class P>
void finish(int rows, const P& p, const Block<Kind>& blk, int64_t m0, int64_t row, int64_t n, const float* tile) {
  const bool one_group = p.groups() == 1;
  for (int j = 0; j < 4; ++j) {
    const __mmask16 lanes = lanes16(p.N - n - 16 * j);
    if (!lanes) break;
    const __m512 scale = _mm512_loadu_ps(p.scale + n + 16 * j);
    const __m512 offset = p.offset ? _mm512_loadu_ps(p.offset + n + 16 * j) : _mm512_setzero_ps();
    const __m512 w_sum = p.x_zp ? _mm512_loadu_ps(p.w_sum + n + 16 * j) : _mm512_setzero_ps();
    const __m512 bias = p.bias ? load16(p.bias + n + 16 * j, lanes) : _mm512_setzero_ps();
    for (int m = 0; m < rows; ++m) {
      const float* t = tile + m * 64 + j * 16;
      const int32_t zp = p.x_zp ? p.x_zp[m0 + row + m] : 0;
      __m512 v;
      if (one_group) {
        typename Kind::Acc raw = load_acc(t, typename Kind::Acc{});
        if constexpr (Kind::KStep == 4)  // int32, still exact
          if (p.x_zp) raw = _mm512_sub_epi32(raw, _mm512_mullo_epi32(splat(zp), _mm512_cvtps_epi32(w_sum)));
        v = _mm512_mul_ps(to_float(raw), scale);
        if (p.offset) v = _mm512_fmadd_ps(splat(blk.row_sum[row + m]), offset, v);
      } else {
        v = _mm512_loadu_ps(t);
        if (p.x_zp) v = _mm512_fnmadd_ps(splat((float)zp), w_sum, v);
      }
      v = p.x_scale ? _mm512_fmadd_ps(v, splat(p.x_scale[m0 + row + m]), bias) : _mm512_add_ps(v, bias);
      store16(p.y + (m0 + row + m) * p.ldy + n + 16 * j, lanes, v);
    }
  }
}

// ---- blocks and threads ------------------------------------------------------------------------------------------------------------------------

inline void stage_row(float* to, const f16* x, int64_t n) {
  for (int64_t k = 0; k < n; k += 16) store16(to + k, lanes16(n - k), load16(x + k, lanes16(n - k)));
}
template <class T> inline void stage_row(T* to, const T* x, int64_t n) { memcpy(to, x, n * sizeof(T)); }

template <class Kind, class P> void prepare_rows(const P& p, const Block<Kind>& blk, int64_t m0, int64_t rows) {
  const int64_t G = p.groups(), group = G > 1 ? p.group : p.K;
  const bool needed = Kind::Decode::Bias != 0 || p.offset;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g < G; ++g) {
      const int64_t k = g * group, len = std::min(group, p.K - k);
      const typename Kind::Sum sum = needed ? Kind::sum(blk.x + m * blk.ldx + k, len) : 0;
      blk.start[g * blk.rows + m] = -Kind::Decode::Bias * sum;
      blk.row_sum[g * blk.rows + m] = (float)(p.x_zp ? sum - (typename Kind::Sum)(p.x_zp[m0 + m] * len) : sum);
    }
}

// Columns n .. n + 63, steps s0 .. s1 - 1 of w -> panel as DecodePanel reads it: bf16 of q * scale + offset, or of q where there is one group.
template <class Kind, class P> void expand(const P& p, int64_t n, const uint8_t* w, int64_t s0, int64_t s1, uint8_t* panel) {
  const typename Kind::Decode decode;
  const bool grouped = p.groups() > 1;
  const int64_t n_pad = p.n_pad(), group_steps = grouped ? p.group / Kind::KStep : s1;
  alignas(64) uint16_t order[32];  // of cvtne2ps's 32 results: the pairs (k, k + 1) side by side
  for (int i = 0; i < 16; ++i) order[2 * i] = i, order[2 * i + 1] = 16 + i;
  const __m512i interleave = _mm512_load_si512(order), high = _mm512_set1_epi32((int)0xFFFF0000);
  for (int64_t s = s0; s < s1;) {
    const int64_t g = s / group_steps, end = std::min(s1, (g + 1) * group_steps);
    __m512 scale[4], offset[4];
    for (int j = 0; j < 4; ++j) {
      scale[j] = grouped ? _mm512_loadu_ps(p.scale + g * n_pad + n + 16 * j) : splat(1.0f);
      const __m512 zero = grouped && p.offset ? _mm512_loadu_ps(p.offset + g * n_pad + n + 16 * j) : _mm512_setzero_ps();
      offset[j] = _mm512_fnmadd_ps(splat(Kind::Decode::Bias), scale[j], zero);
    }
    for (; s < end; ++s, w += Kind::Decode::Bytes, panel += DecodePanel::Bytes) {
      __m512i b[4];
      decode.template pair<0>(w, b);
      decode.template pair<1>(w, b + 2);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512 first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(b[j], 16)), scale[j], offset[j]);
        const __m512 second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(b[j], high)), scale[j], offset[j]);
        _mm512_storeu_si512(panel + 64 * j, _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
      }
    }
  }
}

constexpr int64_t kBlockRows = 192;          // rows of x kept in L2 while the columns pass
constexpr int64_t kPanelBytes = 256 * 1024;  // packed weights kept in L2 while the rows pass
constexpr int64_t kExpandedBytes = 128 * 1024;  // the same of a panel that was expanded
constexpr int64_t kExpandRows = 96;          // EPYC Zen 4, K = N = 2048: the panel wins from here on

template <class Kind, class P> void linear_part(const P& p, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  if (m_begin >= m_end || n_begin >= n_end) return;
  using Staged = typename Kind::Staged;
  const int64_t G = p.groups(), steps = ceil_div(p.K, Kind::KStep), packed_steps = G > 1 ? G * p.group / Kind::KStep : steps;
  const int64_t group_steps = G > 1 ? p.group / Kind::KStep : 1;
  using Expanded = BF16x<DecodePanel>;
  const bool expands = Kind::Expands && m_end - m_begin >= kExpandRows;
  const int64_t panel_steps = expands ? kExpandedBytes / DecodePanel::Bytes : kPanelBytes / Kind::Decode::Bytes;
  const int64_t panel = std::max<int64_t>(1, panel_steps / group_steps) * group_steps;
  const int64_t m_block = std::min(kBlockRows, m_end - m_begin);
  // x is not padded: rows that end inside a step, or that need converting, are staged
  const bool staged = p.K % Kind::KStep || sizeof(Staged) != sizeof(typename Kind::X);
  const int64_t staged_ld = ceil_div(steps * Kind::KStep, 16) * 16;
  const int64_t tile_bytes = m_block * 256, sum_bytes = ceil_div(m_block * G, 16) * 64, x_bytes = staged ? m_block * staged_ld * (int64_t)sizeof(Staged) : 0;
  const int64_t expanded_bytes = expands ? std::min(panel, packed_steps) * DecodePanel::Bytes : 0;
  char* scratch = (char*)_mm_malloc(tile_bytes + 2 * sum_bytes + x_bytes + expanded_bytes, 64);
  float* tiles = (float*)scratch;
  uint8_t* expanded = (uint8_t*)(scratch + tile_bytes + 2 * sum_bytes + x_bytes);
  Staged* x_staged = (Staged*)(scratch + tile_bytes + 2 * sum_bytes);
  Block<Kind> blk{nullptr, 0, (typename Kind::Sum*)(scratch + tile_bytes), (float*)(scratch + tile_bytes + sum_bytes), m_block};
  for (int64_t m0 = m_begin; m0 < m_end; m0 += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, m_end - m0), m_tiles = ceil_div(rows, kTileRows);
    if (staged) {
      for (int64_t m = 0; m < rows; ++m) {
        stage_row(x_staged + m * staged_ld, p.x + (m0 + m) * p.ldx, p.K);
        std::fill(x_staged + m * staged_ld + p.K, x_staged + (m + 1) * staged_ld, Staged{});
      }
      blk.x = x_staged, blk.ldx = staged_ld;
    } else {
      blk.x = (const Staged*)(p.x + m0 * p.ldx), blk.ldx = p.ldx;
    }
    prepare_rows<Kind>(p, blk, m0, rows);
    for (int64_t n = n_begin; n < n_end; n += 64)
      for (int64_t s0 = 0; s0 < steps; s0 += panel) {
        const int64_t s1 = std::min(steps, s0 + panel);
        const uint8_t* w = p.w + (n / 64 * packed_steps + s0) * Kind::Decode::Bytes;
        for (int64_t t = 0; t < m_tiles; ++t) {  // tiles of nearly equal height
          const int64_t row = t * rows / m_tiles, height = (t + 1) * rows / m_tiles - row;
          float* tile = tiles + row * 64;
          if constexpr (Kind::Expands) {
            if (expands && t == 0) expand<Kind>(p, n, w, s0, s1, expanded);
            if (expands) accumulate_rows<Expanded>(height, p, Block<Expanded>{blk.x, blk.ldx, blk.start, blk.row_sum, blk.rows}, row, n, expanded, s0, s1, tile);
          }
          if (!expands) accumulate_rows<Kind>(height, p, blk, row, n, w, s0, s1, tile);
          if (s1 == steps) finish<Kind>(height, p, blk, m0, row, n, tile);
        }
      }
  }
  _mm_free(scratch);
}

template <class Kind, class P> void linear(const P& p, int threads) {
  const int64_t n_blocks = ceil_div(p.N, 64), m_tiles = ceil_div(p.M, kTileRows);
  if (p.M <= 0 || p.N <= 0) return;
  // a grid of threads, tm by tn, with the least work for the busiest; few rows of threads when equal, since each of them reads all weights
  int tm = 1, tn = 1;
  int64_t best = INT64_MAX;
  for (int a = 1; a <= threads; ++a) {
    const int64_t work = ceil_div(m_tiles, a) * ceil_div(n_blocks, threads / a);
    if (work < best) best = work, tm = a, tn = threads / a;
  }
  auto part = [&](int i) {
    const int64_t a = i / tn, b = i % tn;
    linear_part<Kind>(p, p.M * a / tm, p.M * (a + 1) / tm, n_blocks * b / tn * 64, n_blocks * (b + 1) / tn * 64);
  };
  if (tm * tn == 1) return part(0);
#pragma omp parallel for num_threads(tm * tn) schedule(static, 1)
  for (int i = 0; i < tm * tn; ++i) part(i);
}

// ---- entry points ------------------------------------------------------------------------------------------------------------------------------

template <class X, int Bits> struct WeightOnlyKind { using type = FP32xInt<X, Bits>; };
template <int Bits> struct WeightOnlyKind<bf16, Bits> { using type = BF16x<DecodeBF16<Bits>>; };

// w: layout "cpu_bf16". group: even, or >= K (or 0) for one scale per channel.
template <int Bits, class X, class Y, class Bias>
void linear_weight_only(int64_t M, int64_t N, int64_t K, const X* x, int64_t ldx, const uint8_t* w, const float* scale, const float* offset, int64_t group,
                        const Bias* bias, Y* y, int64_t ldy, int threads) {
  const Linear<X, Y, Bias> p{M, N, K, x, ldx, nullptr, nullptr, w, scale, offset, group, nullptr, bias, y, ldy};
  linear<typename WeightOnlyKind<X, Bits>::type>(p, threads);
}

// w: layout "cpu_vnni". group: a multiple of 4, or >= K (or 0) for one scale per channel. K < 65536 within a group.
template <int Bits, class Y, class Bias>
void linear_dynamic(int64_t M, int64_t N, int64_t K, const int8_t* x_q, int64_t ldx, const float* x_scale, const int32_t* x_zp, const uint8_t* w,
                    const float* scale, const float* offset, int64_t group, const float* w_sum, const Bias* bias, Y* y, int64_t ldy, int threads) {
  const Linear<int8_t, Y, Bias> p{M, N, K, x_q, ldx, x_scale, x_zp, w, scale, offset, group, w_sum, bias, y, ldy};
  linear<I8xInt<Bits>>(p, threads);
}

// Columns n .. n + 63 of w, layout "cpu_bf16" -> to, layout "cpu_vnni" of 8 bits: round(w / row).
template <int Bits>
void requantize_columns(int64_t n, int64_t n_pad, int64_t K, const uint8_t* w, const float* scale, const float* offset, int64_t group, const float* row,
                        uint8_t* to) {
  using Decode = DecodeBF16<Bits>;
  const Decode decode;
  const int64_t steps = ceil_div(K, 4), G = group > 0 && group < K ? ceil_div(K, group) : 1;
  const int64_t group_steps = G > 1 ? group / 2 : ceil_div(K, 2), from_steps = G * group_steps;
  const __m512i byte = _mm512_set1_epi32(0xFF), high = _mm512_set1_epi32((int)0xFFFF0000), sign = _mm512_set1_epi8((char)0x80);
  __m512 one[4], s[4], z[4];
  for (int j = 0; j < 4; ++j) one[j] = _mm512_div_ps(splat(1.0f), _mm512_loadu_ps(row + n + 16 * j));
  w += n / 64 * from_steps * Decode::Bytes;
  to += n / 64 * steps * 256;
  for (int64_t step = 0; step < 2 * steps; ++step, w += Decode::Bytes) {
    if (step < from_steps && step % group_steps == 0)
      for (int j = 0; j < 4; ++j) {
        const int64_t at = step / group_steps * n_pad + n + 16 * j;
        s[j] = _mm512_mul_ps(_mm512_loadu_ps(scale + at), one[j]);
        z[j] = offset ? _mm512_mul_ps(_mm512_loadu_ps(offset + at), one[j]) : _mm512_setzero_ps();
        z[j] = _mm512_fnmadd_ps(splat(Decode::Bias), s[j], z[j]);
      }
    __m512i b[4];
    if (step < from_steps) decode.template pair<0>(w, b), decode.template pair<1>(w, b + 2);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i bytes = _mm512_setzero_si512();
      if (step < from_steps) {
        const __m512i even = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(b[j], 16)), s[j], z[j]));
        const __m512i odd = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(b[j], high)), s[j], z[j]));
        bytes = _mm512_or_si512(_mm512_and_si512(even, byte), _mm512_slli_epi32(_mm512_and_si512(odd, byte), 8));
      }
      uint8_t* const p = to + step / 2 * 256 + 64 * j;  // two steps of two make a word of four
      const __m512i before = step % 2 ? _mm512_loadu_si512(p) : sign;
      _mm512_storeu_si512(p, _mm512_xor_si512(before, step % 2 ? _mm512_slli_epi32(bytes, 16) : bytes));
    }
  }
}

// w[N, K], layout "cpu_bf16" with scale, offset, group as above -> to, layout "cpu_vnni" of 8 bits, whose scales are row[n_pad].
template <int Bits>
void requantize(int64_t N, int64_t K, const uint8_t* w, const float* scale, const float* offset, int64_t group, const float* row, uint8_t* to, int threads) {
  const int64_t blocks = ceil_div(N, 64);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < blocks; ++i) requantize_columns<Bits>(64 * i, 64 * blocks, K, w, scale, offset, group, row, to);
}

}  // namespace
}  // namespace aoquant

#undef AOQUANT_INLINE
#endif  // AOQUANT_CPU_LINEAR_H
