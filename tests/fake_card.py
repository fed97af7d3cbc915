"""The path that a GPU takes, tried without one: tensors that say they are on cuda:0, and have shapes but no data.

FakeTensorMode refuses to mix devices as a card does; the kernels are operators with registered fakes, so that whole
steps go through. What a fake can't show, values and launches, the interpreter (test_kernels_triton) and a card
(test_kernels_gpu) show.
test_kernels_fake_card.py runs this file in a process of its own, where PyTorch believes that it was built for CUDA.
"""

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
import triton
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import memtrain
from data.weights import checkpoint, pretrained
from data.world.steps import DemoSteps
from kernels import attention, decode, draw, fused, grpo, input_precision, logprob
from kernels.layout import Layout

CUDA = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Counts what a host waits for: copies between it and the card, unless from pinned memory, and looks at values."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.pinned = 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in ("_to_copy", "copy_") and made.device != (source := args[name == "copy_"]).device:
            self.copies += 1
            asynchronous = args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking")
            if not asynchronous or source.untyped_storage()._cdata not in [
                    x.untyped_storage()._cdata for x in self.pinned]:
                self.waits.append(name)
        if (kwargs or {}).get("pin_memory"):
            self.pinned.append(made)
        masks = name in ("index", "index_put_", "index_put") and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"):
            self.waits.append(name)
        return made


class Launches(TorchDispatchMode):
    """Names what a card would be told to run: operations that compute or copy, and the kernels of `modules`, which are
    not launched. Views and empty memory are none. RMSNorm is one: PyTorch has a kernel for it where it is built for
    CUDA, and takes it apart here."""

    def __init__(self, monkeypatch, *modules):
        super().__init__()
        self.names = []
        monkeypatch.setattr(torch, "rms_norm", lambda x, *_: self.names.append("rms_norm") or torch.empty_like(x))
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, CustomOpDef):  # seen through
                    monkeypatch.setattr(module, name, value._init_fn)
                elif isinstance(value, triton.runtime.KernelInterface):
                    monkeypatch.setattr(module, name, Told(self.names, name))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not view and not name.startswith(("empty", "new_empty", "_unsafe_view")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Told(list):
    """In a kernel's place: kernel[grid](...) notes its name."""

    def __init__(self, names, name):
        super().__init__()
        self.names, self.name = names, name

    def __getitem__(self, grid):
        return lambda *_, **__: self.names.append(self.name)


class Generators(TorchFunctionMode):
    """What a card demands beyond what a fake does: that random numbers are drawn by a generator of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        generator = (kwargs or {}).get("generator")
        if generator is not None and isinstance(args[0], torch.Tensor) and args[0].device.type != generator.device.type:
            raise RuntimeError(f"Expected a '{args[0].device.type}' device type for generator but found "
                               f"'{generator.device.type}'")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def applied(module, function, recurse=True):
    """Module.to() and its like, which swaps tensors in place: fakes can't be swapped."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = torch.nn.Parameter(function(p), p.requires_grad)
        for name, b in m._buffers.items():
            m._buffers[name] = function(b)
    return module


@pytest.fixture
def cuda(monkeypatch):
    """A pretended card; whatever is read back from it is 1."""
    monkeypatch.delenv("MEMTRAIN_KERNELS", raising=False)
    monkeypatch.setattr(FakeTensor, "item", lambda self: torch.ones((), dtype=self.dtype).tolist(), raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: np.ones(
        tuple(self.shape), bool if self.dtype == torch.bool else int).tolist(), raising=False)
    monkeypatch.setattr(FakeTensor, "numpy", lambda self: np.ones(tuple(self.shape), np.float32), raising=False)
    for name, value in (("__float__", 1.0), ("__bool__", True), ("__int__", 1)):
        monkeypatch.setattr(FakeTensor, name, lambda self, value=value: value, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "_apply", applied)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)  # a copy is of the card
    with FakeTensorMode() as mode, Generators():
        yield mode


@pytest.fixture
def files(cuda, monkeypatch):
    """Checkpoints give tensors of the right shape, on the device that was asked for."""
    @contextlib.contextmanager
    def opened(path, framework="pt", device="cpu"):
        with torch._C._DisableTorchDispatch(), real(path, framework) as file:
            shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: (s.get_shape(), s.get_dtype()) for name, s in shapes.items()}
            metadata = file.metadata()
        yield Shapes(shapes, metadata, torch.device(device))

    from safetensors import safe_open as real

    monkeypatch.setattr(checkpoint, "safe_open", opened)
    monkeypatch.setattr(pretrained, "_opened", lambda path, device="cpu": opened(path, "pt", device))
    monkeypatch.setattr(checkpoint, "digest", lambda state, tensors: current["digest"])
    current = {}

    class Shapes:
        def __init__(self, shapes, metadata, device):
            self.shapes, self.device, self.own = shapes, device, metadata or {}
            current["digest"] = self.own.get("digest")

        def metadata(self):
            return self.own

        def keys(self):
            return self.shapes.keys()

        def get_tensor(self, name):
            shape, dtype = self.shapes[name]
            kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
            return torch.empty(shape, dtype=kinds[dtype], device=self.device)


def own_policy(c) -> memtrain.Policy:
    return memtrain.Policy(c, CUDA)


@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_reaches_the_kernels(cuda, tiny, wanted):
    assert memtrain.parse(["--preset", "small"]).tf32
    try:
        own_policy(tiny("--tf32", str(wanted).lower()))
        assert input_precision(torch.float32) == ("tf32" if wanted else "tf32x3")
        assert input_precision(torch.bfloat16) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def where(model: memtrain.Decoder) -> set[torch.device]:
    return {x.device for x in (*model.parameters(), *model.buffers())}


# ---- the parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [(), ("--lora-rank", "2"), ("--qk-norm", "false", "--bias", "true", "--tied",
                                                               "true")], ids=["own", "LoRA", "as Qwen2"])
def test_a_decoder_is_made_and_moved_as_a_whole(cuda, tiny, fields):
    assert where(own_policy(tiny(*fields)).model) == {CUDA}


def test_the_shipped_base_is_loaded(cuda, files):
    policy = own_policy(memtrain.parse(["--stages", "memtrain"]))
    policy.load_base(memtrain.RunFolder(memtrain.Path("nowhere")))
    assert where(policy.model) == {CUDA}


def test_published_weights_go_from_meta_to_the_card(cuda, files, saved_qwen):
    c = memtrain.parse(["--model", str(saved_qwen), "--corpus", "miniworld", "--questions", "", "--train-questions", "",
                        "--benchmarks", "", "--stages", "memtrain", "--dtype", "bfloat16"])
    with torch.device("meta"):
        model = memtrain.Decoder(c, 0)
    pretrained.load_weights(saved_qwen, model, CUDA)
    assert where(model) == {CUDA} and {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {
        torch.bfloat16}


@pytest.fixture(scope="module")
def saved_qwen(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("published")
    config = transformers.Qwen3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      head_dim=16, intermediate_size=64, vocab_size=160)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


PROMPTS = [(list(range(20)), [3, 4]), (list(range(20)), [5]), (list(range(35)), [6, 7, 8])]


@pytest.mark.parametrize("top_p", [1.0, 0.95], ids=["training", "evaluation"])
@pytest.mark.parametrize("chunk", [1, 16], ids=["eager", "as captured"])
def test_the_sampler_admits_draws_and_goes_on(cuda, tiny, chunk, top_p):
    c = tiny("--top-p", str(top_p))
    sampler = memtrain.Sampler(own_policy(c).model, chunk)
    queue = sampler._begin(c, PROMPTS, 24, (1,))
    assert sampler.static == (chunk == 16) and sampler.cache.lengths.device == CUDA
    with torch.no_grad():
        sampler._admit(queue, PROMPTS, [("fake", i) for i in range(3)])
        n = 8 if sampler.static else 3
        n = min(n, sampler.cache.capacity[0])
        sampler._draw(n)
        sampler._forward(n)
    assert len(sampler.owner) == 3 and sampler.hidden.device == CUDA


def in_bf16(model: memtrain.Decoder) -> None:
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            p.data = p.data.bfloat16()


@pytest.mark.parametrize("fields", [(), ("--qk-norm", "false", "--bias", "true"), ("--lora-rank", "2", "--dtype",
                                                                                  "bfloat16")],
                         ids=["own", "as Qwen2", "LoRA in bf16"])
def test_eleven_launches_a_layer_and_decoded_token(cuda, tiny, fields, monkeypatch):
    """Before some were fused, 31 to 35 by the same count; see kernels/README.md."""
    names = []
    for layers in (2, 3):
        c = tiny(*fields, "--layers", str(layers))
        model = own_policy(c).model
        if c.dtype == "bfloat16":
            in_bf16(model)
        sampler = memtrain.Sampler(model, 16)
        with torch.no_grad(), model.merged():
            sampler._admit(sampler._begin(c, PROMPTS, 24, (1,)), PROMPTS, [("fake", i) for i in range(3)])
            n = min(8, sampler.cache.capacity[0])
            with monkeypatch.context() as patch, Launches(patch, decode, fused) as seen:
                sampler._forward(n)
        names.append(seen.names)
    more = [name for name, count in (Counter(names[1]) - Counter(names[0])).items() for _ in range(count)]
    print(more)
    assert len(more) == len(names[1]) - len(names[0]) == 11
    assert {"_decode_prefix", "_decode_suffix", "_norm_rope", "_add_norm", "_swiglu"} <= set(more)


@pytest.mark.parametrize("fields", [(), ("--lora-rank", "2"), ("--lora-rank", "2", "--dtype", "bfloat16", "--recompute",
                                                               "true")], ids=["all weights", "LoRA", "bf16"])
def test_a_grpo_step(cuda, tiny, tokenizer, fields):
    c = tiny(*fields)
    model = own_policy(c).model
    if c.dtype == "bfloat16":
        in_bf16(model)
    turns = [memtrain.Turn(p, g, [7, 8, 9], [-1.0, -2.0, -3.0]) for p, g in PROMPTS]
    batch = memtrain.Batch(turns, [0, 1, 2], [0.0, 1.0, 1.0], [0, 0, 0], [0, 0, 0], {})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    reference = memtrain.reference_of(model, c)
    row = memtrain.update(model, reference, optimizer, c, batch, {0, 1, 2})
    assert {"mismatch", "kl", "grad_norm"} <= row.keys()
    memtrain.accumulate(model, reference, c, batch, [0, 1, 2], c.micro_tokens)  # what is read back says "broken"
    assert {p.grad.device for p in model.parameters() if p.requires_grad} == {CUDA}
    optimizer.step()


@pytest.mark.parametrize("fields", [(), ("--lora-rank", "2"), ("--token-mean",)],
                         ids=["all weights", "LoRA", "mean of tokens"])
def test_a_micro_batch_is_copied_once_and_waited_for_never(cuda, tiny, fields):
    c = tiny(*fields)
    model = own_policy(c).model
    turns = [memtrain.Turn(p, g, [7, 8, 9], [-1.0, -2.0, -3.0]) for p, g in PROMPTS]
    batch = memtrain.Batch(turns, [0, 1, 2], [0.0, 1.0, 1.0], [0, 0, 0], [0, 0, 0], {})
    reference = memtrain.reference_of(model, c)
    with Waits() as seen:
        memtrain.micro_loss(model, reference, c, batch, [0, 1, 2], [[0, 1], [2]], turns, 3)[0].backward()
    assert not seen.waits and seen.copies <= 4, "the batch, and the tiles of three kernels"
    with Waits() as seen:  # what is counted is seen
        torch.tensor([1, 2], device=CUDA), torch.zeros(2).to(CUDA), torch.ones(2, device=CUDA).cpu()
    assert len(seen.waits) == seen.copies == 3


def test_a_step_of_the_base(cuda, tiny, tokenizer):
    c = tiny()
    model = own_policy(c).model
    memtrain.imitate(model, DemoSteps(c, tokenizer)[0], c, 0, CUDA, 0.2)
    hidden = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    assert all(p.grad.device == CUDA for p in hidden)
    torch.optim.Muon(hidden, lr=0.02).step()


@pytest.mark.parametrize("chunk", [1, 16], ids=["eager", "as captured"])
def test_documents_are_read_and_answered(cuda, tiny, tokenizer, monkeypatch, chunk):
    """The whole loop of evaluation. Everything that is read back is 1, so that each response is one token long."""
    monkeypatch.setattr(memtrain.Sampler, "_replay", lambda self: (self._draw(len(self.owner)),
                                                                   self._forward(len(self.owner))))
    c = memtrain.as_evaluated(tiny())
    policy = own_policy(c)
    agent = memtrain.Agent(policy.model, policy.tokenizer, c, memtrain.Sampler(policy.model, chunk))
    problem = memtrain.Data(c, tokenizer).masked_problem(0)
    (rollout,) = agent.read([problem], [("fake", 0)])
    assert len(rollout.turns) == len(rollout.sections) + 1 > 2


def test_the_operators_and_their_fakes_agree():
    """torch.library's own check, where the kernels run: interpreted, or on a card."""
    names = {f"{module.__name__.rpartition('.')[2]}_{name}" for module, names in (
        (attention, ("launch_forward", "launch_queries", "launch_keys")), (decode, ("decode",)), (draw, ("launch",)),
        (fused, [f"launch_{x}" for y in ("add_norm", "norm_rope", "swiglu") for x in (y, f"{y}_gradient")]),
        (logprob, ("launch_forward", "launch_backward")),
        (grpo, ("launch_advantages", "launch_loss", "launch_sweep")))
        for name in names}
    for name in names:
        assert hasattr(torch.ops.memtrain, name), name
    q, k = torch.empty(7, 4, 16), torch.empty(7, 2, 16)
    layout = Layout([3], [4], [0])
    arguments = (q, k, k, *layout.tiles(16), layout.own_start, *layout.group_range)
    torch.library.opcheck(torch.ops.memtrain.attention_launch_forward, arguments, test_utils=("test_schema",))


# ---- the faults of 2026-11-27, put back ------------------------------------------------------------------------------


def test_a_layout_that_says_cuda_where_its_tensors_say_cuda_0_is_noticed(cuda, monkeypatch):
    layout = Layout([3], [4], [0], CUDA)
    q, k = torch.empty(7, 4, 16, device=CUDA), torch.empty(7, 2, 16, device=CUDA)
    assert attention.memory_attention(q, k, k, layout).device == CUDA
    layout.device = torch.device("cuda")
    with pytest.raises(ValueError, match="expected one dtype and one device"):
        attention.memory_attention(q, k, k, layout)


def test_a_decoder_made_on_the_card_with_a_cpu_generator_is_noticed(cuda, tiny):
    with torch.device(CUDA), pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        memtrain.Decoder(tiny(), 29)


def test_rotary_frequencies_left_on_the_cpu_are_noticed(cuda, tiny):
    c = tiny()
    model = own_policy(c).model
    model.inverse_frequency = model.inverse_frequency.cpu()
    with pytest.raises(RuntimeError, match="same device"):
        memtrain.score(model, memtrain.pack([([1, 2, 3], [([4], [5, 6])])], CUDA))


def test_a_device_always_has_its_index(monkeypatch):
    for name, value in (("is_available", lambda: True), ("current_device", lambda: 0), ("set_device", lambda d: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delenv("MEMTRAIN_KERNELS", raising=False)
    assert memtrain.choose_device("auto") == memtrain.choose_device("cuda") == CUDA
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert memtrain.choose_device("auto") == torch.device("cuda", 3)
