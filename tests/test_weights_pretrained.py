"""Published checkpoints: transformers and PEFT are the oracles, on random weights that they saved themselves."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

import memtrain
from data import InputError
from data.weights.pretrained import (
    check_window,
    export_adapter,
    export_weights,
    load_adapter,
    load_weights,
    published,
    read_shape,
)
from memtrain import Sampler, pack, score

transformers = pytest.importorskip("transformers")
VOCAB = 160
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
SCALED = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6}}),
    "qwen3 untied, one key head": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2 untied, all key heads": ("Qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama 3, scaled": ("Llama", {"tie_word_embeddings": False, "rope_parameters": SCALED}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e5}}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(name, dtype, shard) -> (folder, transformers' model in eval mode)."""
    made = {}

    def build(name="qwen3", dtype=torch.float32, shard="5GB"):
        if (name, dtype, shard) not in made:
            family, extra = FAMILIES[name]
            config = getattr(transformers, f"{family}Config")(**SMALL | extra)
            model = randomise(getattr(transformers, f"{family}ForCausalLM")(config).float(), 5).to(dtype).eval()
            folder = tmp_path_factory.mktemp("hub") / "tiny"
            model.save_pretrained(folder, max_shard_size=shard)
            made[name, dtype, shard] = folder, model
        return made[name, dtype, shard]
    return build


def ours(folder: Path, *options: str) -> memtrain.Decoder:
    """The decoder over a saved checkpoint, as a run builds it."""
    c = memtrain.parse(["--model", str(folder), "--preset", "paper", "--dtype", "float32", "--lora-rank", "0",
                        "--recompute", "false", *options])
    with torch.device("meta"):
        model = memtrain.Decoder(c, 0)
    load_weights(folder, model, "cpu")
    return model


def logits(model: memtrain.Decoder, ids: list[int]) -> torch.Tensor:
    """(T,V) of one sequence, packed as a prefix with one suffix."""
    packed = pack([(ids[:7], [(ids[7:], [0])])])
    hidden = model(packed.ids, packed.layout.positions, lambda _, q, k, v: memtrain.memory_attention(
        q, k, v, packed.layout))
    return hidden @ model.head.T


def sequence(length: int = 90) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_tokens_and_gradient_are_those_of_transformers(name, shard, saved):
    folder, theirs = saved(name, shard=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "20KB"), "the case has to be sharded"
    mine, ids = ours(folder), sequence()
    assert not any(p.is_meta for p in mine.parameters()) and mine.base_id
    expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(mine, ids), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3, "not a uniform policy: that would hide mistakes"

    greedy = theirs.generate(torch.tensor([ids[:20]]), do_sample=False, max_new_tokens=64, eos_token_id=VOCAB - 1,
                             pad_token_id=0)[0, 20:].tolist()
    c = memtrain.dataclasses.replace(mine.c, top_p=1e-9)
    (turn,) = Sampler(mine)(c, [(ids[:12], ids[12:20])], ["k"], 64, [VOCAB - 1])
    assert turn.sampled == greedy and len(greedy) == 64

    theirs.zero_grad()
    packed = pack([(ids[:7], [(ids[7:30], ids[30:])])])
    loss = -score(mine, packed)[0].mean()
    loss.backward()
    their_loss = torch.nn.functional.cross_entropy(expected[29:-1], torch.tensor(ids[30:]))
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=0)
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for n, p in mine.named_parameters():
        wanted = gradients[published(n)]
        torch.testing.assert_close(p.grad, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-9, rtol=1e-3, msg=n)


def test_bf16_loads_without_a_second_copy_and_stays_near(saved):
    folder, theirs = saved("qwen3", torch.bfloat16)
    mine, ids = ours(folder, "--dtype", "bfloat16", "--lora-rank", "2"), sequence()
    frozen = {n: p for n, p in mine.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    assert {p.dtype for p in mine.parameters() if p.requires_grad} == {torch.float32}, "adapters are masters"
    exact = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
        torch.tensor([ids])).logits[0]
    error = (logits(mine, ids).float() - exact).abs().max()
    theirs_error = (theirs(torch.tensor([ids])).logits[0].float() - exact).abs().max()
    assert error < 1.5 * theirs_error, (error, theirs_error)


# ---- adapters


def adapted(folder: Path, *options: str) -> memtrain.Decoder:
    model = ours(folder, "--lora-rank", "3", "--lora-alpha", "6", *options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(p)))
    return model


def test_merging_is_what_the_adapters_say_and_is_undone_exactly(saved):
    model, ids = adapted(saved("qwen2")[0]), sequence(40)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with torch.no_grad():
        apart = logits(model, ids)
        with model.merged():
            assert not torch.equal(model.state_dict()["blocks.0.q.weight"], before["blocks.0.q.weight"])
            torch.testing.assert_close(logits(model, ids), apart, atol=1e-5, rtol=1e-5)
        with model.with_adapters(None):
            assert (logits(model, ids) - apart).abs().max() > 0.1
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    with pytest.raises(RuntimeError), model.merged():
        raise RuntimeError
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "also where sampling failed"


@pytest.mark.parametrize("targets", ["q,k,v,o,gate,up,down", "q,v"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama 3, scaled"])
def test_peft_reads_our_adapters_and_we_read_its(name, targets, saved, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = saved(name)
    model, ids = adapted(folder, "--lora-targets", targets), sequence()
    export_adapter(tmp_path / "ours", model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)
    with theirs.disable_adapter():
        assert (theirs(torch.tensor([ids])).logits[0] - expected).abs().max() > 0.1, "the adapter has to matter"
    theirs.save_pretrained(tmp_path / "theirs")
    back = ours(folder, "--lora-rank", "3", "--lora-alpha", "6", "--lora-targets", targets)
    load_adapter(tmp_path / "theirs", back)
    assert all(torch.equal(p, back.get_parameter(n)) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["qwen3", "qwen2 untied, all key heads", "llama 3, scaled"])
def test_transformers_reads_our_merged_weights(name, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("data.weights.pretrained.SHARD", 20_000)
    folder, _ = saved(name)
    model, ids = adapted(folder), sequence()
    (folder / "vocab.json").write_text("{}")
    export_weights(tmp_path / "hf", model, folder)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1 and (tmp_path / "hf/vocab.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(logits(model, ids), theirs(torch.tensor([ids])).logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(ours(tmp_path / "hf"), ids), logits(model, ids), atol=1e-4, rtol=0)


def test_our_own_decoder_is_not_exported(tiny, decoder, tmp_path):
    with pytest.raises(InputError, match="--format hf: a decoder of our own"):
        export_weights(tmp_path, decoder(tiny(), VOCAB), None)
    assert not any(tmp_path.iterdir())


# ---- two sources for one fact, and what may be left out


def alone(folder: Path, **others: str) -> dict:
    """The tensors of the single file, which is removed; others: name="what it becomes a copy of, halved"."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors | {name: tensors[source] * 0.5 for name, source in others.items()}


def stored(folder: Path, tensors: dict) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def halves(folder: Path) -> tuple[dict, dict]:
    every = sorted(alone(folder).items())
    return dict(every[:9]), dict(every[9:])


def parts(folder: Path, drop: str = "", **more: str) -> None:
    """Two files and an index, which leaves one tensor out and names more."""
    first, second = halves(folder)
    names = {n: f"part-{i}.safetensors" for i, part in enumerate((first, second)) for n in part}
    index(folder, {n: f for n, f in names.items() if n != drop} | more, first, second)


def beside_an_index(folder: Path) -> None:
    parts(folder)
    first, second = (load_file(folder / f"part-{i}.safetensors") for i in range(2))
    stored(folder, {n: t * 0.7 for n, t in (first | second).items()})


def in_two_files(folder: Path) -> None:
    first, second = halves(folder)
    second |= {n: t * 0.7 for n, t in first.items()}
    index(folder, {"a": "part-0.safetensors", "b": "part-1.safetensors"}, first, second)


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
AGREE = {  # family and what is done to its folder
    "a head of its own": ("qwen3", lambda f: stored(f, alone(f, **{HEAD: EMBED}))),
    "a head that is the embedding": ("qwen3", lambda f: stored(f, {HEAD: (t := alone(f))[EMBED].clone()} | t)),
    "the embedding under the head's name": ("qwen3", lambda f: only(f, rename=lambda n: HEAD if n == EMBED else n)),
    "one file beside older parts": ("qwen3", beside_an_index),
    "an index beside one file's lost parts": ("qwen3", lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {EMBED: "lost.safetensors"}}))),
    "an index that names too much": ("qwen3", lambda f: parts(f, **{
        HEAD: "part-1.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq": "part-0.safetensors"})),
    "an index that names too little": ("qwen2", lambda f: parts(f, "model.layers.1.mlp.down_proj.weight")),
    "tensors in two files": ("qwen2", in_two_files),
    "names without model": ("qwen3", lambda f: only(f, rename=lambda n: n.removeprefix("model."))),
    "some names without model": ("llama 3, scaled", lambda f: only(f, rename=lambda n: n.removeprefix(
        "model." if "norm" in n else ""))),
    "llama3 by hand": ("qwen3", lambda f: edit(f / "config.json", rope_scaling=SCALED)),
    "llama3 by hand without a base": ("llama 3, scaled", lambda f: edit(f / "config.json", rope_scaling={
        k: v for k, v in SCALED.items() if k != "rope_theta"})),
    "llama3 in the older form": ("smollm2", lambda f: edit(f / "config.json", rope_parameters=None, rope_theta=3e4,
        rope_scaling={k: v for k, v in SCALED.items() if k != "rope_theta"})),
    "llama3 without its original length": ("smollm2", lambda f: edit(f / "config.json", max_position_embeddings=50,
        rope_parameters={k: v for k, v in SCALED.items() if not k.startswith("original")})),
    "the original length beside it": ("smollm2", lambda f: edit(f / "config.json", rope_parameters=SCALED,
        original_max_position_embeddings=40)),
    "linear by one": ("qwen2", lambda f: edit(f / "config.json", rope_scaling={"type": "linear", "factor": 1.0})),
    "swish": ("qwen2", lambda f: edit(f / "config.json", hidden_act="swish")),
    "a window where no layer slides": ("qwen2", lambda f: edit(
        f / "config.json", use_sliding_window=True, sliding_window=8, max_window_layers=2, layer_types=None)),
    "a window of no layer type": ("qwen2", lambda f: edit(
        f / "config.json", use_sliding_window=True, sliding_window=8, max_window_layers=0)),
}


@pytest.mark.parametrize("name", AGREE)
def test_of_two_sources_the_one_counts_that_counts_for_transformers(name, saved, tmp_path):
    family, change = AGREE[name]
    folder, ids = Path(shutil.copytree(saved(family)[0], tmp_path / "tiny")), sequence()
    before = logits(ours(folder), ids)
    change(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mine = ours(folder)
    after = logits(mine, ids)
    torch.testing.assert_close(after, theirs(torch.tensor([ids])).logits[0], atol=1e-4, rtol=0)
    matters = any(word in name for word in ("its own", "older", "two files", "llama3", "beside it"))
    assert ((after - before).abs().max() > 0.1) == matters, "the case has to matter, or to be the same"
    if mine.c.tied != before_tied(family):
        export_weights(tmp_path / "out", mine, folder)
        torch.testing.assert_close(logits(ours(tmp_path / "out"), ids), after, atol=1e-4, rtol=0)


def before_tied(family: str) -> bool:
    return FAMILIES[family][1]["tie_word_embeddings"]


@pytest.mark.parametrize("lacking", ["head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
                                     "rope_parameters", "hidden_act"])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(family, lacking, tmp_path):
    getattr(transformers, f"{family}Config")(**SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != lacking}))
    theirs, mine = transformers.AutoConfig.from_pretrained(tmp_path), read_shape(tmp_path)
    assert mine["head_size"] == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (mine["key_heads"], mine["norm_eps"], mine["tied"], mine["rope_theta"]) == (
        theirs.num_key_value_heads, theirs.rms_norm_eps, theirs.tie_word_embeddings,
        theirs.rope_parameters["rope_theta"])


def test_the_digest_of_a_base_is_that_of_its_weights(saved, tmp_path):
    folder, _ = saved("qwen2")
    split = Path(shutil.copytree(folder, tmp_path / "split"))
    parts(split)
    assert ours(split).base_id == ours(folder).base_id != ours(saved("qwen3")[0]).base_id


def test_a_window_beyond_the_positions_of_a_checkpoint_is_refused(saved):
    folder, _ = saved("qwen3")
    check_window(folder, SMALL["max_position_embeddings"])
    with pytest.raises(InputError, match=r"max_position_embeddings 4096.*--window 4097"):
        check_window(folder, SMALL["max_position_embeddings"] + 1)
    device = torch.device("cpu")
    with pytest.raises(InputError, match="--window 8192"):
        memtrain.Policy(memtrain.parse(["--model", str(folder), "--preset", "paper"]), device)


# ---- bad input


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only(folder: Path, keep=lambda name: True, rename=lambda name: name, change=lambda x: x) -> None:
    path = folder / "model.safetensors"
    save_file({rename(n): change(t) for n, t in load_file(path).items() if keep(n)}, path)


def index(folder: Path, weight_map: dict | None, *parts: dict) -> None:
    """An index in the single file's place; parts: further files, part-0.safetensors and so on."""
    if weight_map is None or not parts:
        (folder / "model.safetensors").unlink(missing_ok=True)
    for i, tensors in enumerate(parts):
        save_file(tensors, folder / f"part-{i}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | (
        {} if weight_map is None else {"weight_map": weight_map})))


BAD = {  # what is done to a folder: parts of the answer
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "a missing field": (lambda f: edit(f / "config.json", hidden_size=None), ["config.json", "malformed"]),
    "another architecture": (lambda f: edit(f / "config.json", model_type="mamba"), ["model_type 'mamba'", "Llama"]),
    "a sliding window": (lambda f: edit(f / "config.json", use_sliding_window=True, sliding_window=16,
                                        max_window_layers=1, layer_types=None), ["a sliding window"]),
    "sliding layers": (lambda f: edit(f / "config.json", layer_types=["sliding_attention"]), ["sliding_attention"]),
    "experts": (lambda f: edit(f / "config.json", num_experts=8), ["experts"]),
    "yarn": (lambda f: edit(f / "config.json", rope_parameters={"rope_type": "yarn"}), ["'yarn'"]),
    "quantized": (lambda f: edit(f / "config.json", quantization_config={"bits": 4}), ["quantized"]),
    "other activations": (lambda f: edit(f / "config.json", hidden_act="gelu"), ["'gelu'"]),
    "output bias": (lambda f: edit(f / "config.json", attention_bias=True), ["attention_bias"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "is missing"]),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 5000), ["model.safetensors", "can't be read"]),
    "a tensor less": (lambda f: only(f, lambda n: n != "model.norm.weight"), ["model.norm.weight", "none of its"]),
    "a tensor more": (lambda f: only(f, rename=lambda n: n.replace("layers.1", "layers.7")), ["layers.7", "no place"]),
    "other shapes": (lambda f: edit(f / "config.json", intermediate_size=60), ["has shape", "56", "60"]),
    "an index of nothing": (lambda f: index(f, None), ["no weight_map"]),
    "a shard is missing": (lambda f: index(f, {"model.norm.weight": "model-9.safetensors"}),
                           ["model-9.safetensors", "is missing"]),
    "a way out": (lambda f: index(f, {"x": "../../etc/passwd"}), ["not a file of this folder"]),
    "yarn by hand": (lambda f: edit(f / "config.json", rope_scaling=SCALED | {"rope_type": "yarn"}), ["'yarn'"]),
    "yarn in the older spelling": (lambda f: edit(f / "config.json", rope_scaling={"type": "yarn", "factor": 4}),
                                   ["'yarn'"]),
    "linear scaling": (lambda f: edit(f / "config.json", rope_scaling={"type": "linear", "factor": 2}), ["'linear'"]),
    "a factor of nothing": (lambda f: edit(f / "config.json", rope_scaling={"factor": 4.0}), ["factor of rope"]),
    "an unknown rope setting": (lambda f: edit(f / "config.json", rope_parameters={"mrope_section": [4, 4]}),
                                ["mrope_section of rope"]),
    "scaling in a word": (lambda f: edit(f / "config.json", rope_scaling="yarn"), ["rope scaling 'yarn'"]),
    "half of each head": (lambda f: edit(f / "config.json", partial_rotary_factor=0.5), ["partial rotary"]),
    "pickles alone": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                      ["pytorch_model.bin", "save_pretrained", "safetensors"]),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ["--init", "--model"]),
}


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved("qwen3")[0], tmp_path / "tiny"))


@pytest.mark.parametrize("name", BAD)
def test_checkpoints_that_are_refused(name, copy):
    change, parts = BAD[name]
    change(copy)
    with pytest.raises(InputError) as caught:
        ours(copy)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text


ADAPTERS = {
    "of another rank": ({"r": 4}, ["--lora-rank 4"]),
    "of another scale": ({"lora_alpha": 8}, ["--lora-alpha 8"]),
    "of PEFT's own scale": ({"lora_alpha": ...}, ["--lora-alpha 8"]),
    "DoRA": ({"use_dora": True}, ["use_dora", "plain LoRA"]),
    "another kind": ({"peft_type": "IA3"}, ["IA3"]),
    "with an embedding": ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
    "woken by tokens": ({"alora_invocation_tokens": [7]}, ["alora_invocation_tokens"]),
    "with biases": ({"lora_bias": True}, ["lora_bias"]),
    "of repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, ["layer_replication"]),
    "of a kind yet to come": ({"use_quantum": {"bits": 2}}, ["use_quantum"]),
    **{start: ({"init_lora_weights": start}, [start, "path_initial_model"]) for start in (
        "pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "to come")},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_refused(name, saved, tmp_path):
    folder, _ = saved("qwen3")
    changes, parts = ADAPTERS[name]
    model = adapted(folder)
    export_adapter(tmp_path, model)
    load_adapter(tmp_path, model)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}))
    with pytest.raises(InputError) as caught:
        load_adapter(tmp_path, model)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("options", [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
                                     {"init_lora_weights": False, "lora_dropout": 0.1}, {"init_lora_weights": "pissa"}])
def test_an_adapter_of_peft_computes_what_it_does_there_or_is_refused(options, saved, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = saved("qwen2")

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    theirs = randomised(peft.get_peft_model(base(), peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)))
    theirs.save_pretrained(tmp_path)
    mine, ids = ours(folder, "--lora-rank", "4", "--lora-alpha", "6"), sequence()
    if options.get("init_lora_weights") == "pissa":
        with pytest.raises(InputError, match="pissa"):
            load_adapter(tmp_path, mine)
        return
    load_adapter(tmp_path, mine)
    expected = peft.PeftModel.from_pretrained(base(), tmp_path).eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(mine, ids), expected, atol=1e-4, rtol=0)


def randomised(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("spelling", ["Qwen/Tiny", "C:\\models\\tiny", "unsloth/tiny-bnb-4bit", "/elsewhere/tiny/"])
def test_another_spelling_of_the_base_is_a_note_other_weights_are_refused(spelling, saved, tmp_path, capsys):
    folder, _ = saved("qwen3")
    model = adapted(folder)
    export_adapter(tmp_path, model)
    edit(tmp_path / "adapter_config.json", base_model_name_or_path=spelling)
    load_adapter(tmp_path, model)
    assert "note" not in capsys.readouterr().out, "the digest says that it is the same base"
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file, {"format": "pt"})  # as PEFT writes it
    for _ in range(2):
        load_adapter(tmp_path, model)
    assert capsys.readouterr().out.count(spelling) == 1, "said once"
    save_file(tensors, file, {"format": "pt", "base": "0123456789abcdef"})
    with pytest.raises(InputError, match="digest 0123456789abcdef"):
        load_adapter(tmp_path, model)
    file.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model.bin.*save_pretrained"):
        load_adapter(tmp_path, model)


def test_an_adapter_of_other_shapes_or_targets_is_refused(saved, tmp_path):
    folder, _ = saved("qwen3")
    export_adapter(tmp_path, adapted(folder))
    for other, part in ((adapted(saved("qwen3 untied, one key head")[0]), "has shape"),
                        (adapted(folder, "--lora-targets", "q"), "no place here")):
        with pytest.raises(InputError, match=part):
            load_adapter(tmp_path, other)


def test_options_that_do_not_go_with_a_model(saved):
    folder = str(saved("qwen3")[0])
    for argv, part in (
            (["--model", folder, "--width", "64"], "--width"), (["--model", "./nowhere"], "no such folder"),
            (["--model", folder, "--stages", "base"], "--model is the base"),
            (["--model", folder, "--lora-targets", "q,z"], "--lora-targets q,z"),
            (["--dtype", "bfloat16"], "--lora-rank"), (["--rope-scaling", "8,1"], "--rope-scaling 8,1"),
            (["--lora-rank", "4", "--stages", "base"], "--lora-rank 4"),
            (["--model", folder, "--lora-rank", "0", "--init", "x", "--dtype", "float32"], "--init x")):
        with pytest.raises(InputError, match=part):
            memtrain.locate(memtrain.parse(argv).model)


def test_read_shape(saved):
    shape = read_shape(saved("llama 3, scaled")[0])
    assert shape["rope_scaling"] == "8,1,4,64" and shape["head_size"] == 8 and not shape["qk_norm"]
