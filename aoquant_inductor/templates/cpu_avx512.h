// The part of cpu_linear.h, which includes it, for x86 CPUs with AVX512 F/BW/VL/DQ/VBMI/VNNI/BF16 (Zen 4 and later, Sapphire Rapids and later): vectors of 16 lanes,
// layouts "cpu_bf16" and "cpu_vnni".
//
// Decoding runs on the vector ports that the dot products leave free, so few rows decode weights again for every tile. Many rows of bf16 read a
// panel of bf16 weights.
//
// Needs -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mavx512bf16.

// ---- vectors -----------------------------------------------------------------------------------------------------------------------------------

using Floats = __m512;
using Ints = __m512i;
constexpr int kLanes = 16;

// the first n of 16 elements of x, y or bias; the others are not touched
inline __mmask16 lanes16(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
inline Floats load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lanes16(n), p); }
inline Floats load_part(const f16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes16(n), p)); }
inline Floats load_part(const bf16* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes16(n), p)), 16));
}
inline void store_part(float* p, int64_t n, Floats v) { _mm512_mask_storeu_ps(p, lanes16(n), v); }
inline void store_part(f16* p, int64_t n, Floats v) {
  _mm256_mask_storeu_epi16(p, lanes16(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_part(bf16* p, int64_t n, Floats v) { _mm256_mask_storeu_epi16(p, lanes16(n), (__m256i)_mm512_cvtneps_pbh(v)); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats splat(float v) { return _mm512_set1_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
// float and int32 accumulators under one name
inline Ints splat(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Floats load_acc(const float* t, Floats) { return _mm512_loadu_ps(t); }
inline Ints load_acc(const float* t, Ints) { return _mm512_loadu_si512(t); }
inline void store_acc(float* t, Floats a) { _mm512_storeu_ps(t, a); }
inline void store_acc(float* t, Ints a) { _mm512_storeu_si512(t, a); }
inline Floats to_float(Floats a) { return a; }
inline Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }

inline __m512i broadcast4(const void* p) { return _mm512_set1_epi32(word(p)); }

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
  static constexpr int KStep = 2, Burst = 1;
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
  static constexpr int KStep = 2, Burst = 1;
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
    for (int64_t k = 0; k < n; k += 16) s = _mm512_add_ps(s, load_part(x + k, n - k));
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
  static constexpr int KStep = 4, Burst = 1;
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

// ---- the loop's body ---------------------------------------------------------------------------------------------------------------------------

// One step: acc[m][j] += x * w for MR rows and the registers First .. First + NR - 1 of the packed row.
template <class Kind, int MR, int First, int NR>
AOQUANT_INLINE void take_steps(typename Kind::Acc (*acc)[NR], const typename Kind::Decode& decode, const typename Kind::Staged* x, int64_t ldx, const uint8_t* w, int64_t) {
  // Weights that come from memory, EPYC Zen 4, K = N = 2048, M = 4: int4 309 -> 261 us with it; int8, which streams faster: 144 -> 171 us, so not there.
  constexpr bool Prefetch = First == 0 && MR > 1 && Kind::Decode::Bits == 4;
  constexpr int Ahead = 2048;  // bytes
  __m512i b[NR];
  decode.template pair<First / 2>(w, b);
  if constexpr (NR == 4) decode.template pair<1>(w, b + 2);
  if constexpr (Prefetch) {
    _mm_prefetch((const char*)w + Ahead, _MM_HINT_T0);
    if constexpr (Kind::Decode::Bytes > 64) _mm_prefetch((const char*)w + Ahead + 64, _MM_HINT_T0);
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) Kind::template dot<NR>(acc[m], x + m * ldx, b);
}

// Of the 4 registers of a packed row, how many one pass over it takes: as many as leave the accumulators in registers, twice MR * NR of them where
// there are groups.
constexpr int registers(int rows, bool grouped) { return grouped && rows > 3 ? 2 : 4; }

// kColumns columns from n, steps s0 .. s1 - 1 of w -> panel as DecodePanel reads it: bf16 of q * scale + offset, or of q where there is one group.
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

template <class X, int Bits> struct WeightOnlyKind { using type = FP32xInt<X, Bits>; };
template <int Bits> struct WeightOnlyKind<bf16, Bits> { using type = BF16x<DecodeBF16<Bits>>; };
template <int Bits> using DynamicKind = I8xInt<Bits>;
template <class Kind> using ExpandedKind = BF16x<DecodePanel>;  // reads what expand<Kind> wrote

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
