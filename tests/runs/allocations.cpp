// Stands before c10's CPU allocator: hands every request on to it, from whatever thread, and keeps a record of each.
#include <c10/core/CPUAllocator.h>

#include <chrono>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

struct Event {
  int64_t nanoseconds;  // since the epoch
  int64_t address;
  int64_t bytes;  // less than 0: taken back
};

std::mutex guard;
std::vector<Event> events;
std::unordered_map<void*, size_t> sizes;
bool recording = false;
c10::Allocator* before = nullptr;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

void given(void* address, size_t bytes) {
  std::lock_guard<std::mutex> held(guard);
  if (recording && bytes) {
    sizes[address] = bytes;
    events.push_back({now(), reinterpret_cast<int64_t>(address), static_cast<int64_t>(bytes)});
  }
}

void taken(void* address) {
  std::lock_guard<std::mutex> held(guard);
  auto found = sizes.find(address);
  if (found == sizes.end()) return;
  if (recording) events.push_back({now(), reinterpret_cast<int64_t>(address), -static_cast<int64_t>(found->second)});
  sizes.erase(found);
}

void release(void* address) {
  taken(address);
  before->raw_deleter()(address);
}

struct Counting : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* address = before->raw_allocate(bytes);
    given(address, bytes);
    return {address, address, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
};

Counting counting;

}  // namespace

extern "C" {
void start() {
  std::lock_guard<std::mutex> held(guard);
  if (!before) {
    before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&counting, 255);
  }
  events.clear();
  sizes.clear();
  recording = true;
}
int64_t stop() {
  std::lock_guard<std::mutex> held(guard);
  recording = false;
  return static_cast<int64_t>(events.size());
}
const Event* recorded() { return events.data(); }
}
