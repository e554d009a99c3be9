// A launch but for addresses, as Python planned it (runtime/cuda/recipe.py), and what carries it out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace jagtile {

// What a block holds addresses of. Python names them so.
enum Operand : uint8_t { Q, K, V, OUT, LSE, CU_SEQLENS_Q, CU_SEQLENS_K, WORK_LIST, SCRATCH, DOUT, DLSE, DQ, DK, DV };
constexpr std::array OPERANDS{"q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "work_list", "scratch",
                              "dout", "dlse", "dq", "dk", "dv"};
using Addresses = std::array<uint64_t, OPERANDS.size()>;  // 0: it is absent
constexpr std::array LAID_OUT{Q, K, V, OUT, DOUT, DQ, DK, DV};  // those that a plan knows the strides of
constexpr size_t MAX_BLOCK_BYTES = 2048;

struct Recipe {
  struct Word {
    uint32_t offset;  // in the block
    Operand operand;
    uint64_t beyond;  // bytes between the operand's address and the one that is written
  };
  struct Kernel {
    void* function;
    unsigned grid, threads, smem;
  };

  std::vector<char> block;
  std::vector<Word> words;
  std::vector<Kernel> kernels;
  uint64_t unaligned;     // bits that addresses of what is laid out must not have
  int64_t scratch_bytes;  // 0: none is used
  int64_t list;           // which kind of work list the kernels read, -1 for none
  bool dependent;         // each kernel is launched while the one before may still run, and waits for it itself

  bool takes(const Addresses& at) const {
    uint64_t all = 0;
    for (Operand operand : LAID_OUT) all |= at[operand];
    return !(all & unaligned);
  }
};

// CUlaunchAttribute and CUlaunchConfig of cuda.h, which is not everywhere where the host is built.
struct LaunchAttribute {
  int id;
  union alignas(8) {
    int number;
    char room[64];
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], smem;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, number) == 8);
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32);
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

// The CUDA driver and Python's part of a launch. Tests and benchmarks put stand-ins here.
struct Driver {
  using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned smem,
                         void* stream, void** parameters, void** extra);
  using LaunchEx = int (*)(const LaunchConfig*, void* function, void** parameters, void** extra);
  using IsCapturing = int (*)(void* stream, int* status);

  Launch launch = nullptr;
  LaunchEx launch_ex = nullptr;
  IsCapturing is_capturing = nullptr;
  c10::DeviceType device_type = c10::DeviceType::CUDA;
  PyObject* raw_stream = nullptr;  // (device index) -> the current stream's address
  PyObject* failed = nullptr;      // (code, device index, how often before): raises, or makes a context current
};
inline Driver driver;

// Throws what Python raised, for whoever catches it in another thread too.
[[noreturn]] inline void throw_pythons() {
  python_error error;
  error.persist();
  throw error;
}

// torch's streams as the driver knows them: a stream's id stands for the same one as long as the process lives.
class Streams {
 public:
  void* current(c10::Device device) {
    const c10::Stream stream = c10::impl::getDeviceGuardImpl(device.type())->getStream(device);
    {
      std::lock_guard lock(mutex_);
      for (const Known& known : known_)
        if (known.index == device.index() && known.id == stream.id()) return known.raw;
    }
    void* raw = ask(device);
    std::lock_guard lock(mutex_);
    if (known_.size() >= MAX_KNOWN) known_.clear();
    known_.push_back({device.index(), stream.id(), raw});
    return raw;
  }

  void forget() {
    std::lock_guard lock(mutex_);
    known_.clear();
  }

 private:
  struct Known {
    c10::DeviceIndex index;
    c10::StreamId id;
    void* raw;
  };
  static constexpr size_t MAX_KNOWN = 64;

  static void* ask(c10::Device device) {
    pybind11::gil_scoped_acquire gil;
    PyObject* answer = PyObject_CallFunction(driver.raw_stream, "i", static_cast<int>(device.index()));
    if (!answer) throw_pythons();
    const auto raw = PyLong_AsUnsignedLongLong(answer);
    Py_DECREF(answer);
    if (raw == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw_pythons();
    return reinterpret_cast<void*>(raw);
  }

  std::mutex mutex_;
  std::vector<Known> known_;
};
inline Streams streams;

// Whether the stream may be captured into a graph: also where the driver can't tell.
inline bool may_capture(void* stream) {
  int status = 0;
  return driver.is_capturing(stream, &status) != 0 || status != 0;
}

inline void launch(const Recipe& recipe, const Addresses& at, void* stream, c10::Device device) {
  alignas(64) char block[MAX_BLOCK_BYTES];
  std::memcpy(block, recipe.block.data(), recipe.block.size());
  for (const auto& [offset, operand, beyond] : recipe.words)
    if (at[operand]) {
      const uint64_t address = at[operand] + beyond;
      std::memcpy(block + offset, &address, sizeof address);
    }
  void* parameters[] = {block};
  LaunchAttribute dependent{PROGRAMMATIC_STREAM_SERIALIZATION, {1}};
  for (const auto& [function, grid, threads, smem] : recipe.kernels) {
    const auto start = [&, f = function, g = grid, t = threads, s = smem] {
      if (recipe.dependent) {
        const LaunchConfig config{{g, 1, 1}, {t, 1, 1}, s, stream, &dependent, 1};
        return driver.launch_ex(&config, f, parameters, nullptr);
      }
      return driver.launch(f, g, 1, 1, t, 1, 1, s, stream, parameters, nullptr);
    };
    int code = start();
    for (int again = 0; code; ++again, code = start()) {  // once more where the thread had no context yet
      pybind11::gil_scoped_acquire gil;
      PyObject* answer = PyObject_CallFunction(driver.failed, "iii", code, static_cast<int>(device.index()), again);
      if (!answer) throw_pythons();
      Py_DECREF(answer);
    }
  }
}

}  // namespace jagtile
