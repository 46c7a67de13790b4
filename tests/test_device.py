"""The answers of model/device.py for devices that this machine lacks: torch's modules for them are stood in for."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_generation import random_ids, tiny_model

from model import batching, device
from model.batching import Engine
from model.sampling import SamplingParams
from trainer import checkpoint, cost, distributed
from trainer.arguments import parse_arguments, stage_parser

CPU, MPS, XPU = (torch.device(name) for name in ("cpu", "mps", "xpu"))


@pytest.fixture
def two_intel_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: XPU)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_devices_of_this_machine_are_found(two_intel_gpus):
    for name in ("cpu", "xpu", "xpu:1"):
        assert str(device.choose_device(name)) == name


@pytest.mark.parametrize(
    "name, said", [("xpu:2", "has 2 xpu"), ("mps", "no usable mps"), ("xpu:200", "has 2 xpu"), ("gpu", "not a device")]
)
def test_other_devices_are_refused_by_name(two_intel_gpus, name, said):
    with pytest.raises(ValueError, match=f"--device {name}: .*{said}"):
        device.choose_device(name)


def test_npu_needs_torch_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ValueError, match="--device npu:1: torch_npu is not installed"):
        device.choose_device("npu:1")


def test_no_device_but_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert device.choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="use --device cpu"):
        device.choose_device("xpu")


def test_torch_npu_is_imported_for_its_device(tmp_path):
    (tmp_path / "torch_npu.py").write_text(
        "import torch, types\n"
        "torch.utils.rename_privateuse1_backend('npu')\n"
        "torch._register_device_module('npu', types.SimpleNamespace(is_bf16_supported=lambda: True))\n"
        "torch.distributed.Backend.register_backend('hccl', lambda *_: None, devices=['npu'])\n"
    )
    code = (
        "import sys, torch\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from model import device\n"
        "torch.accelerator.current_accelerator = lambda check_available=False: torch.device('npu')\n"
        "torch.accelerator.device_count = lambda: 8\n"
        "print(npu := device.choose_device('npu:7'), device.usable_dtype('bfloat16', npu), device.collectives(npu))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("npu:7 (torch.bfloat16, '') cpu:gloo,npu:hccl")


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_where_the_device_has_it(monkeypatch, has_it):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: has_it)
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_it)
    for place in (MPS, XPU):
        dtype, notice = device.usable_dtype("bfloat16", place)
        assert dtype == (torch.bfloat16 if has_it else torch.float32)
        assert bool(notice) != has_it and (has_it or place.type in notice)
        assert device.usable_dtype("float16", place)[0] == torch.float32


def test_collectives_reach_the_cpu_where_a_device_has_no_float64():
    assert device.collectives(CPU) == "gloo" and device.collectives(torch.device("cuda")) == "nccl"
    assert device.collectives(XPU) == "cpu:gloo,xpu:xccl"
    assert [device.where_float64_is(place) for place in (CPU, MPS, XPU)] == [CPU] * 3


def test_a_device_without_float64_has_its_tokens_drawn_on_the_cpu(monkeypatch):
    """The counts of the penalty and each step's logits are asked for; the answer stays the same."""
    asked = []

    def where(place):
        asked.append(place)
        return CPU

    params = SamplingParams(temperature=1.0, repetition_penalty=1.2, max_new_tokens=4, stop_ids=(), seed=3)
    expected = [token.id for token in Engine(tiny_model(), slots=1).submit(random_ids(5), params)]
    engine = Engine(tiny_model(), slots=1)
    monkeypatch.setattr(batching, "where_float64_is", where)
    assert [token.id for token in engine.submit(random_ids(5), params)] == expected
    assert len(asked) == 1 + 4  # the counts of the penalty, then each token


class IntelGPU:
    """Stands for torch.xpu."""

    def __init__(self):
        self.chosen, self.state, self.resets = None, torch.tensor([7]), 0

    def device_count(self):
        return 2

    def set_device(self, place):
        self.chosen = place

    def current_device(self):
        return 1

    def get_device_properties(self, index):
        return SimpleNamespace(total_memory=index * 2**34)

    def reset_peak_memory_stats(self):
        self.resets += 1

    def max_memory_allocated(self):
        return 123

    def get_rng_state(self):
        return self.state

    def set_rng_state(self, state):
        self.state = state


@pytest.fixture
def gpu(monkeypatch):
    gpu = IntelGPU()
    monkeypatch.setattr(torch, "get_device_module", lambda _: gpu)
    return gpu


def test_memory_of_a_device_with_its_own(gpu):
    memory = cost.Memory("xpu:1")
    memory.reset()
    assert (gpu.resets, memory.peak(), memory.total()) == (1, 123, 2**34)


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not tell its memory")
def test_memory_shared_with_the_cpu(gpu):
    memory = cost.Memory("mps")
    memory.reset()
    assert gpu.resets == 0 and 2**20 < memory.peak() < memory.total()


def test_random_numbers_of_the_device_go_into_the_resume_state(gpu):
    kept = checkpoint._rng_state(XPU)
    gpu.state = None
    checkpoint._set_rng_state(kept, XPU)
    assert gpu.state.tolist() == [7]
    on_cuda = {name: value for name, value in kept.items() if name != "xpu"} | {"cuda": torch.tensor([8])}
    checkpoint._set_rng_state(on_cuda, XPU)  # a state of another kind of device says nothing here
    assert gpu.state.tolist() == [7]
    checkpoint._set_rng_state(on_cuda, torch.device("cuda"))
    assert gpu.state.tolist() == [8]
    assert not {"cpu", "cuda"} & checkpoint._rng_state(CPU).keys()


@pytest.mark.parametrize("local_rank, chosen", [(1, "xpu:1"), (2, None)])
def test_each_process_takes_a_device_of_its_own(monkeypatch, two_intel_gpus, gpu, local_rank, chosen):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    args = parse_arguments(stage_parser("x"), ["--device", "xpu"])
    if chosen is None:
        with pytest.raises(ValueError, match="2 are here"):
            distributed.start_process(args)
    else:
        assert str(distributed.start_process(args).device) == str(gpu.chosen) == chosen


def test_an_apple_gpu_is_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: MPS)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="--device mps: .*one process"):
        distributed.start_process(parse_arguments(stage_parser("x"), ["--device", "mps"]))
