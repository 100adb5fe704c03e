#include "host.h"

/// The order of the threads' turns (see host.h), and how many multiprocessors the machine claims to have.
extern "C" void vmad_host_machine(unsigned turn_order, int multiprocessors) {
  vmad::host::turn_order = turn_order;
  vmad::host::multiprocessors = multiprocessors;
}

/// Since the library was opened.
extern "C" unsigned vmad_host_launches() { return vmad::host::launches; }
