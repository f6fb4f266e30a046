// Runs the CPU kernels of csrc/cpu for another process, which has the other end of stdin and stdout
// (backend.py). The instruction set is one that an emulator runs, or that plain C++ stands for.
//
// A request is one line and the bytes of its buffers:
//     op side flush argument...
// An argument is `=<number>`, or a buffer of so many bytes, `<number` that the op reads, `>number`
// that it writes or `+number` that it changes. side (`after`, `before`) says at which end of each
// buffer the unmapped page lies; the other end has kFill up to the next page. flush (0, 1): whether
// the caller's floating-point mode flushes subnormals to zero. The answer is a line, `ok` or what
// went wrong, and after `ok` the bytes that the op wrote.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#if !defined(__aarch64__)
#include <immintrin.h>
#endif

#include "cpu_ops.h"
#include "dispatch.h"
#include "parallel.h"

namespace {

using qkern::Status;
using qkern::binding::Op;

constexpr unsigned char kFill = 0xa5;

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "server: %s\n", why.c_str());
  std::exit(2);
}

// Memory against an unmapped page.
class Buffer {
 public:
  Buffer(std::size_t bytes, bool guard_after) : bytes_(bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    inner_bytes_ = (bytes + page - 1) / page * page;
    mapped_bytes_ = inner_bytes_ + 2 * page;
    void* mapped =
        mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) stop("mmap failed");
    mapped_ = static_cast<unsigned char*>(mapped);
    inner_ = mapped_ + page;
    if (inner_bytes_ > 0 && mprotect(inner_, inner_bytes_, PROT_READ | PROT_WRITE) != 0) {
      stop("mprotect failed");
    }
    std::memset(inner_, kFill, inner_bytes_);
    data_ = guard_after ? inner_ + inner_bytes_ - bytes : inner_;
  }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(mapped_, other.mapped_);
    std::swap(inner_, other.inner_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(inner_bytes_, other.inner_bytes_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    return *this;
  }
  ~Buffer() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
  }

  unsigned char* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  bool fill_is_intact() const {
    for (const unsigned char* p = inner_; p < inner_ + inner_bytes_; ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != kFill) return false;
    }
    return true;
  }

 private:
  unsigned char* mapped_ = nullptr;
  unsigned char* inner_ = nullptr;
  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0, inner_bytes_ = 0, mapped_bytes_ = 0;
};

const Op& find_op(const std::string& name) {
  for (const Op& op : qkern::binding::kCpuOps) {
    if (name == op.name) return op;
  }
  stop("no op " + name);
}

// The floating-point mode: FPCR, or what of MXCSR is not a record of exceptions.
#if defined(__aarch64__)
constexpr std::uint64_t kFlush = 1u << 24;
std::uint64_t get_mode() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_mode(std::uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value)); }
#else
constexpr std::uint64_t kFlush = 1u << 15 | 1u << 6;  // results to zero, and inputs
std::uint64_t get_mode() { return _mm_getcsr() & 0xffc0u; }
void set_mode(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#endif

void read_exactly(unsigned char* to, std::size_t bytes) {
  if (bytes > 0 && std::fread(to, 1, bytes, stdin) != bytes) stop("a request breaks off");
}

struct Request {
  const Op* op;
  bool flush;
  std::vector<std::int64_t> values;
  std::vector<Buffer> inputs, outputs;
};

Request read_request(const std::string& line) {
  std::istringstream words(line);
  std::string name, side, word;
  Request request{};
  if (!(words >> name >> side >> request.flush)) stop("not a request: " + line);
  request.op = &find_op(name);
  while (words >> word) {
    const long long number = std::atoll(word.c_str() + 1);
    if (word[0] == '=') {
      request.values.push_back(number);
      continue;
    }
    auto& list = word[0] == '<' ? request.inputs : request.outputs;
    list.emplace_back(static_cast<std::size_t>(number), side == "after");
    read_exactly(list.back().data(), list.back().bytes());
    request.values.push_back(
        static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(list.back().data())));
  }
  return request;
}

std::string perform(Request& request) {
  std::vector<std::string> before;
  for (const Buffer& input : request.inputs) {
    before.emplace_back(reinterpret_cast<const char*>(input.data()), input.bytes());
  }
  qkern::binding::Arguments arguments(request.values);
  const std::uint64_t own_mode = get_mode();
  const std::uint64_t callers_mode = request.flush ? own_mode | kFlush : own_mode;
  set_mode(callers_mode);
  const Status status = request.op->run(arguments);
  const std::uint64_t left_mode = get_mode();
  set_mode(own_mode);
  if (!status.ok()) return status.message;
  if (left_mode != callers_mode) return "the kernel changed the floating-point mode";
  for (std::size_t i = 0; i < before.size(); ++i) {
    const Buffer& input = request.inputs[i];
    if (std::memcmp(before[i].data(), input.data(), input.bytes()) != 0) {
      return "the kernel wrote to an input";
    }
  }
  for (const auto* list : {&request.inputs, &request.outputs}) {
    for (const Buffer& buffer : *list) {
      if (!buffer.fill_is_intact()) return "the kernel wrote beside a buffer";
    }
  }
  return "ok";
}

}  // namespace

int main() {
  // Under the emulator threads come late, and tests want to see what they do together.
  qkern::cpu::share_always(true);
  const qkern::cpu::KernelTable* kernels = qkern::cpu::active_kernels();
  const char* names[qkern::cpu::kMaxIsas];
  const int count = qkern::cpu::available_isas(names);
  std::printf("%s:", kernels == nullptr ? "none" : kernels->name);
  for (int i = 0; i < count; ++i) std::printf(" %s", names[i]);
  std::printf(" %.3f\n", qkern::cpu::bfloat16_rate());
  std::fflush(stdout);
  char line[8192];
  while (std::fgets(line, sizeof(line), stdin) != nullptr) {
    Request request = read_request(line);
    const std::string answer = perform(request);
    std::printf("%s\n", answer.c_str());
    if (answer == "ok") {
      for (const Buffer& output : request.outputs) {
        std::fwrite(output.data(), 1, output.bytes(), stdout);
      }
    }
    std::fflush(stdout);
  }
  return 0;
}
