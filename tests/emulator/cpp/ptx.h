// The arithmetic and the memory accesses of PTX instructions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define EMU_AT(text) (emu::self->at = text)

namespace emu {

// The bits of a register as another type of the same size.
template <typename To, typename From>
inline To as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a PTX operand of another size than the instruction's type");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

template <typename To, typename From>
inline void set(To& to, From value) {
  to = as<To>(value);
}

template <long long kValue, int kOne, int kOther>
constexpr int immediate() {
  static_assert(kValue == kOne || kValue == kOther, "an immediate that the instruction does not take");
  return kValue;
}
template <typename T>
inline uint32_t& word(T& reg) {
  static_assert(sizeof(T) == 4, "a 32-bit register");
  return reinterpret_cast<uint32_t&>(reg);
}
inline unsigned lane_id(bool of_warp = false) {
  const unsigned index = (self->thread.z * block.y + self->thread.y) * block.x + self->thread.x;
  return of_warp ? index / 32 : index % 32;
}
inline uint64_t in_cluster(uint64_t address, uint32_t rank) {
  return reinterpret_cast<uint64_t>(pointer_in_cluster(reinterpret_cast<const void*>(address), rank));
}
inline uint32_t in_cluster(uint32_t address, uint32_t rank) {
  return address_in_cluster(address, rank);
}

// ---- operands of asm statements, by constraint ----------------------------------------------------------------------
template <typename T>
inline uint32_t in_r(T value) {
  static_assert(sizeof(T) == 4 && !std::is_floating_point<T>::value, "constraint r takes a 32-bit integer");
  return as<uint32_t>(value);
}
template <typename T>
inline uint64_t in_l(T value) {
  static_assert(sizeof(T) == 8 && !std::is_floating_point<T>::value,
                "constraint l takes a 64-bit integer or a pointer");
  return as<uint64_t>(value);
}
template <typename T>
inline uint16_t in_h(T value) {
  static_assert(sizeof(T) == 2, "constraint h takes a 16-bit integer");
  return as<uint16_t>(value);
}
template <typename T>
inline float in_f(T value) {
  static_assert(std::is_same<T, float>::value, "constraint f takes a float");
  return value;
}
template <typename T>
inline double in_d(T value) {
  static_assert(std::is_same<T, double>::value, "constraint d takes a double");
  return value;
}

// ---- sixteen-bit floats ---------------------------------------------------------------------------------------------
inline float bf16_to_float(uint16_t bits) { return as<float>(uint32_t(bits) << 16); }
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = as<uint32_t>(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 0x3FF;
  if (exponent == 31) return as<float>(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) return as<float>(sign | as<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
  return as<float>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline uint16_t float_to_f16(float value) {
  if (value != value) return 0x7FFF;
  const uint32_t bits = as<uint32_t>(value), sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x1p-14f)
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f)));
  const uint32_t rest = bits & 0x7FFFFFFF, rounded = rest + 0xFFF + ((rest >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}
inline uint32_t pack_bf16x2(float high, float low) { return uint32_t(float_to_bf16(high)) << 16 | float_to_bf16(low); }
inline uint32_t pack_f16x2(float high, float low) { return uint32_t(float_to_f16(high)) << 16 | float_to_f16(low); }

template <bool kBf16>
inline float half_of(uint32_t packed, int which) {
  const uint16_t bits = static_cast<uint16_t>(packed >> (16 * which));
  return kBf16 ? bf16_to_float(bits) : f16_to_float(bits);
}
template <bool kBf16, typename Operation>
inline uint32_t on_halves(uint32_t a, uint32_t b, uint32_t c, Operation operation) {
  float result[2];
  for (int i = 0; i < 2; ++i) result[i] = operation(half_of<kBf16>(a, i), half_of<kBf16>(b, i), half_of<kBf16>(c, i));
  return kBf16 ? pack_bf16x2(result[1], result[0]) : pack_f16x2(result[1], result[0]);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline float min_nan(float a, float b) { return a != a || b != b ? NAN : fminf(a, b); }
inline float tf32_rounded(float x) {  // to nearest, ties away
  return x != x || std::isinf(x) ? x : as<float>((as<uint32_t>(x) + 0x1000u) & 0xFFFFE000u);
}
template <typename T>
inline T shift_left(T value, uint32_t count) {
  return count >= 8 * sizeof(T) ? T(0) : static_cast<T>(value << count);
}
template <typename T>
inline T shift_right(T value, uint32_t count) {
  return count >= 8 * sizeof(T) ? static_cast<T>(value < T(0) ? T(-1) : T(0)) : static_cast<T>(value >> count);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const uint32_t index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    result |= (table >> index & 1) << bit;
  }
  return result;
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (select & 7)) & 0xFF;
    if (select & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= byte << (8 * i);
  }
  return result;
}
template <typename T, typename Operation>
inline T reduce_sync(uint32_t mask, T value, Operation operation) {
  T result = value;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = as<T>(shuffle(mask, as<uint32_t>(value), 0, lane, 32));
    result = first ? other : operation(result, other);
    first = false;
  }
  return result;
}

// ---- memory ---------------------------------------------------------------------------------------------------------
enum class Space { kGlobal, kShared, kGeneric };

template <typename T>
inline T* located(Space space, uint64_t address, int count) {
  const uint32_t bytes = count * sizeof(T);
  if (address % bytes)
    fail("address 0x%llx is not a multiple of %u bytes", static_cast<unsigned long long>(address), bytes);
  if (space == Space::kShared) return static_cast<T*>(shared_pointer(own_offset(static_cast<uint32_t>(address)), bytes));
  T* pointer = reinterpret_cast<T*>(address);
  return pointer;
}
template <typename T, typename... Registers>
inline void load(Space space, uint64_t address, Registers&... registers) {
  const T* from = located<T>(space, address, sizeof...(registers));
  (set(registers, *from++), ...);
}
template <typename T, typename... Registers>
inline void load_strong(Space space, uint64_t address, Registers&... registers) {
  T values[sizeof...(registers)], *next = values;
  const T* from = located<T>(space, address, sizeof...(registers));
  strong_access(from, sizeof values, Strong::kLoad, false);
  raw_copy(values, from, sizeof values);
  (set(registers, *next++), ...);
}
template <typename T, typename... Values>
inline void store_strong(Space space, uint64_t address, bool release, Values... values) {
  const T all[] = {as<T>(values)...};
  T* to = located<T>(space, address, sizeof...(values));
  strong_access(to, sizeof all, Strong::kStore, release);
  raw_copy(to, all, sizeof all);
  progress();
}
template <typename T, typename... Values>
inline void store(Space space, uint64_t address, Values... values) {
  T* to = located<T>(space, address, sizeof...(values));
  ((*to++ = as<T>(values)), ...);
  progress();
}
template <typename T, typename Operation>
inline T atomic(Space space, uint64_t address, bool release, Operation operation) {
  T* pointer = located<T>(space, address, 1);
  strong_access(pointer, sizeof(T), Strong::kExchange, release);
  T old;
  raw_copy(&old, pointer, sizeof old);
  const T changed = operation(old);
  raw_copy(pointer, &changed, sizeof changed);
  progress();
  poll();
  return old;
}
template <typename T, typename... Values>
inline void reduce_add(Space space, uint64_t address, bool release, Values... values) {
  T* to = located<T>(space, address, sizeof...(values));
  strong_access(to, sizeof...(values) * sizeof(T), Strong::kAdd, release);
  const T terms[] = {as<T>(values)...};
  for (T term : terms) {
    T sum;
    raw_copy(&sum, to, sizeof sum);
    sum = static_cast<T>(sum + term);
    raw_copy(to++, &sum, sizeof sum);
  }
  progress();
}

}  // namespace emu
