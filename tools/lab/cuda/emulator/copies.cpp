// cp.async: what each thread has started and not waited for.
#include "cuda_emulator/sanitizers.h"
#include "cuda_emulator/scheduler.h"
#include "thread.h"

namespace qkern::cuda::emulator {

void queue_copy(const Copy& copy) {
  const TsanIgnores ignores;
  Thread& me = running_thread();
  me.copies.push_back(copy);
  ++me.uncommitted;
}

void commit_copies() {
  const TsanIgnores ignores;
  Thread& me = running_thread();
  me.groups.push_back(me.uncommitted);
  me.uncommitted = 0;
}

bool pop_copy(std::size_t pending, Copy& copy) {
  const TsanIgnores ignores;
  Thread& me = running_thread();
  while (me.groups.size() > pending && me.groups.front() == 0) me.groups.pop_front();
  if (me.groups.size() <= pending) return false;
  copy = me.copies.front();
  me.copies.pop_front();
  --me.groups.front();
  return true;
}

}  // namespace qkern::cuda::emulator
