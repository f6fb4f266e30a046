// Runs the CPU kernels of csrc/cpu for another process: an AArch64 program that an emulator runs.
// backend.py holds the other end of stdin and stdout.
//
// A request is one line and the bytes of its buffers:
//     op side flush argument...
// An argument is `=<number>`, or a buffer of so many bytes, `<number` that the op reads, `>number`
// that it writes or `+number` that it changes. side (`after`, `before`) says at which end of each
// buffer the unmapped page lies; the other end has kFill up to the next page. flush (0, 1): whether
// the caller's FPCR flushes subnormals to zero. The answer is a line, `ok` or what went wrong, and
// after `ok` the bytes that the op wrote.
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

#include "dispatch.h"
#include "qkern/ops.h"

namespace {

using qkern::Status;

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

// The arguments of a function of qkern._C in their order, taken one after the other.
class Arguments {
 public:
  explicit Arguments(const std::vector<std::int64_t>& values) : values_(values) {}

  std::int64_t size() {
    if (next_ == values_.size()) stop("too few arguments");
    return values_[next_++];
  }
  int number() { return static_cast<int>(size()); }
  qkern::DType dtype() { return static_cast<qkern::DType>(number()); }
  template <typename T>
  T* at() {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(size()));
  }
  // packed to block_size, as all ops on 4-bit weights order them.
  qkern::Weight4bit weight() {
    qkern::Weight4bit weight;
    weight.packed = at<const std::uint8_t>();
    weight.absmax = at<const void>();
    weight.nested_absmax = at<const float>();
    weight.nested_offset = at<const float>();
    weight.codes.format = number();
    weight.codes.codebook = at<const float>();
    weight.block_size = size();
    return weight;
  }
  void end() const {
    if (next_ != values_.size()) stop("too many arguments");
  }

 private:
  const std::vector<std::int64_t>& values_;
  std::size_t next_ = 0;
};

Status quantize_4bit(Arguments& from) {
  qkern::Quantize4bitArgs args;
  args.x = from.at<const void>();
  args.x_dtype = from.dtype();
  args.numel = from.size();
  args.codes.format = from.number();
  args.codes.codebook = from.at<const float>();
  args.block_size = from.size();
  args.packed = from.at<std::uint8_t>();
  args.absmax = from.at<float>();
  return qkern::cpu::quantize_4bit(args, from.number());
}

Status dequantize_4bit(Arguments& from) {
  qkern::Dequantize4bitArgs args;
  args.weight = from.weight();
  args.weight.rows = 1;
  args.weight.cols = from.size();
  args.out = from.at<void>();
  args.out_dtype = from.dtype();
  return qkern::cpu::dequantize_4bit(args, from.number());
}

Status quantize_8bit(Arguments& from) {
  qkern::Quantize8bitArgs args;
  args.x = from.at<const void>();
  args.x_dtype = from.dtype();
  args.numel = from.size();
  args.map = from.at<const float>();
  args.block_size = from.size();
  args.codes = from.at<std::uint8_t>();
  args.absmax = from.at<float>();
  return qkern::cpu::quantize_8bit(args, from.number());
}

Status dequantize_8bit(Arguments& from) {
  qkern::Dequantize8bitArgs args;
  args.codes = from.at<const std::uint8_t>();
  args.absmax = from.at<const float>();
  args.map = from.at<const float>();
  args.block_size = from.size();
  args.numel = from.size();
  args.out = from.at<void>();
  args.out_dtype = from.dtype();
  return qkern::cpu::dequantize_8bit(args, from.number());
}

Status quantize_absmax(Arguments& from) {
  qkern::QuantizeAbsmaxArgs args;
  args.absmax = from.at<const float>();
  args.numel = from.size();
  args.codes = from.at<std::uint8_t>();
  args.nested_absmax = from.at<float>();
  args.nested_offset = from.at<float>();
  return qkern::cpu::quantize_absmax(args, from.number());
}

qkern::Linear4bitArgs linear_arguments(Arguments& from, bool forward) {
  qkern::Linear4bitArgs args;
  args.x = from.at<const void>();
  args.dtype = from.dtype();
  args.m = from.size();
  args.x_row_stride = from.size();
  args.weight = from.weight();
  args.weight.rows = from.size();
  args.weight.cols = from.size();
  if (forward) args.bias = from.at<const void>();
  args.y = from.at<void>();
  args.batch_invariant = from.number() != 0;
  return args;
}

Status linear_4bit(Arguments& from) {
  const qkern::Linear4bitArgs args = linear_arguments(from, true);
  return qkern::cpu::linear_4bit(args, from.number());
}

Status linear_4bit_dx(Arguments& from) {
  const qkern::Linear4bitArgs args = linear_arguments(from, false);
  return qkern::cpu::linear_4bit_dx(args, from.number());
}

Status adamw_step(Arguments& from) {
  std::vector<qkern::AdamWTensor> tensors(static_cast<std::size_t>(from.size()));
  for (qkern::AdamWTensor& tensor : tensors) {
    tensor.param = from.at<void>();
    tensor.grad = from.at<const void>();
    tensor.exp_avg = from.at<void>();
    tensor.exp_avg_sq = from.at<void>();
    tensor.exp_avg_absmax = from.at<float>();
    tensor.exp_avg_sq_absmax = from.at<float>();
    tensor.factors = from.at<const qkern::AdamWFactors>();
    tensor.dtype = from.dtype();
    tensor.numel = from.size();
    tensor.index = from.size();
    tensor.first = from.size();
  }
  qkern::AdamWArgs args;
  args.tensors = tensors.data();
  args.count = static_cast<std::int64_t>(tensors.size());
  args.stochastic_rounding = from.number() != 0;
  args.seed = static_cast<std::uint64_t>(from.size());
  return qkern::cpu::adamw_step(args, from.number());
}

struct Op {
  const char* name;
  Status (*run)(Arguments&);
};
constexpr Op kOps[] = {
    {"quantize_4bit", quantize_4bit},     {"dequantize_4bit", dequantize_4bit},
    {"quantize_8bit", quantize_8bit},     {"dequantize_8bit", dequantize_8bit},
    {"quantize_absmax", quantize_absmax}, {"linear_4bit", linear_4bit},
    {"linear_4bit_dx", linear_4bit_dx},   {"adamw_step", adamw_step},
};

const Op& find_op(const std::string& name) {
  for (const Op& op : kOps) {
    if (name == op.name) return op;
  }
  stop("no op " + name);
}

std::uint64_t get_fpcr() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_fpcr(std::uint64_t value) { asm volatile("msr fpcr, %0" ::"r"(value)); }

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
  Arguments arguments(request.values);
  const std::uint64_t own_fpcr = get_fpcr();
  constexpr std::uint64_t kFlushToZero = 1u << 24;
  const std::uint64_t callers_fpcr = request.flush ? own_fpcr | kFlushToZero : own_fpcr;
  set_fpcr(callers_fpcr);
  const Status status = request.op->run(arguments);
  const std::uint64_t left_fpcr = get_fpcr();
  set_fpcr(own_fpcr);
  arguments.end();
  if (!status.ok()) return status.message;
  if (left_fpcr != callers_fpcr) return "the kernel changed FPCR";
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
  const qkern::cpu::KernelTable* kernels = qkern::cpu::active_kernels();
  const char* names[qkern::cpu::kMaxIsas];
  const int count = qkern::cpu::available_isas(names);
  std::printf("%s:", kernels == nullptr ? "none" : kernels->name);
  for (int i = 0; i < count; ++i) std::printf(" %s", names[i]);
  std::printf("\n");
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
