#include "cuda_emulator/async_proxy.h"

#include <vector>

#include "cuda_emulator/sanitizers.h"
#include "products.h"
#include "thread.h"

namespace qkern::cuda::emulator {
namespace {

constexpr std::uint32_t kAligned = 1024;
constexpr std::uint32_t kUnaligned = kAligned + 16;
constexpr std::size_t kGranule = 16;

// Who wrote a granule last, and how many fences that thread had called by then.
struct Written {
  const Thread* by = nullptr;
  unsigned fences = 0;
};

struct Proxy {
  unsigned char* data = nullptr;
  std::size_t size = 0;
  std::uint32_t address = kUnaligned;  // of `data`
  std::vector<Written> granules;       // none where nobody asks
};

Proxy& proxy() {
  static Proxy instance;
  return instance;
}

}  // namespace

void start_async_proxy(const SharedVariable& dynamic_shared) {
  const TsanIgnores ignores;
  Proxy& self = proxy();
  self.data = dynamic_shared.data;
  self.size = dynamic_shared.size;
  self.address = kUnaligned;
  self.granules.assign(capability() == 90 ? self.size / kGranule : 0, Written{});
}

std::uint32_t dynamic_shared_address() { return proxy().address; }

bool in_dynamic_shared(std::uint32_t offset) {
  return std::size_t{offset} + kGranule <= proxy().size;
}

bool visible_to_products(std::uint32_t offset) {
  const Written& written = proxy().granules[offset / kGranule];
  return written.by == nullptr || written.by->proxy_fences > written.fences;
}

unsigned char* dynamic_shared_1024() {
  proxy().address = kAligned;
  return proxy().data;
}

std::uint32_t shared_address(const void* p, const Site& site) {
  const Proxy& self = proxy();
  const auto* byte = static_cast<const unsigned char*>(p);
  if (byte < self.data || byte >= self.data + self.size) fail(site, "outside shared memory");
  return self.address + static_cast<std::uint32_t>(byte - self.data);
}

void note_shared_write(const void* p) {
  Proxy& self = proxy();
  const auto* byte = static_cast<const unsigned char*>(p);
  if (byte < self.data || byte >= self.data + self.size) return;
  const std::size_t granule = static_cast<std::size_t>(byte - self.data) / kGranule;
  if (granule >= self.granules.size()) return;
  const Thread& me = running_thread();
  self.granules[granule] = {&me, me.proxy_fences};
}

void require_hopper(const Site& site) {
  if (capability() != 90) fail(site, "needs sm_90a");
}

void fence_async_proxy(const Site& site) {
  require_hopper(site);
  ++running_thread().proxy_fences;
}

}  // namespace qkern::cuda::emulator
