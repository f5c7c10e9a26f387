"""Every tuner of the installed peft federates two clients for one round, or says here why it cannot."""

import peft
import pytest
import torch

from clients.train import Job, train
from fedpeft import seeds
from fedpeft.adapters.injected import attach
from fedpeft.adapters.tuner import CANNOT, Tuner
from fedpeft.aggregate import weighted_mean
from fedpeft.config import Training
from fedpeft.strategy import Phase
from strategies.fedavg import FedAvg

LINEAR = {"target_modules": "all-linear"}
TUNERS = {  # the smallest options, and a base it fits
    "ADALORA": ("bert", {**LINEAR, "init_r": 4}),
    "ADAMSS": ("vit", {**LINEAR, "r": 8, "num_subspaces": 2}),
    "ADAPTION_PROMPT": ("llama", {"adapter_len": 3, "adapter_layers": 2}),
    "BEFT": ("vit", LINEAR),
    "BOFT": ("vit", LINEAR),
    "C3A": ("bert", {**LINEAR, "block_size": 4}),
    "CARTRIDGE": ("llama", {"num_virtual_tokens": 3}),
    "CPT": ("gpt2", {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}),
    "DEFT": ("gpt2", {**LINEAR, "r": 4}),
    "DELORA": ("llama", {**LINEAR, "r": 4}),
    "FOURIERFT": ("gpt2_classifier", {**LINEAR, "n_frequency": 50}),
    "FROD": ("vit", LINEAR),
    "GLORA": ("bert", {**LINEAR, "r": 4}),
    "GRALORA": ("llama", {**LINEAR, "r": 4}),
    "HIRA": ("gpt2", {**LINEAR, "r": 4}),
    "HRA": ("vit", {**LINEAR, "r": 4}),
    "IA3": ("gpt2_classifier", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "LN_TUNING": ("llama", {}),
    "LOHA": ("bert", {**LINEAR, "r": 4}),
    "LOKR": ("vit", {**LINEAR, "r": 4}),
    "LORA": ("gpt2", {**LINEAR, "r": 4}),
    "MISS": ("llama", {**LINEAR, "r": 4}),
    "OFT": ("bert", {**LINEAR, "oft_block_size": 4}),
    "OSF": ("llama", LINEAR),
    "PEANUT": ("vit", {**LINEAR, "r": 4}),
    "PREFIX_TUNING": ("gpt2_classifier", {"num_virtual_tokens": 3}),
    "PROMPT_TUNING": ("bert", {"num_virtual_tokens": 3}),
    "PSOFT": ("vit", {**LINEAR, "r": 4}),
    "PVERA": ("bert", {**LINEAR, "r": 8}),
    "P_TUNING": ("llama", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "RANDLORA": ("gpt2_classifier", {**LINEAR, "r": 4, "randlora_alpha": 8}),
    "ROAD": ("vit", {**LINEAR, "group_size": 4}),
    "SHADOW": ("llama", {}),
    "SHIRA": ("vit", {**LINEAR, "r": 2}),
    "SUPERTUNING": ("llama", {**LINEAR, "sparsity": 0.5}),
    "TINYLORA": ("bert", LINEAR),
    "TRAINABLE_TOKENS": ("gpt2", {"token_indices": list(range(3, 20))}),
    "UNILORA": ("vit", LINEAR),
    "VBLORA": ("bert", {**LINEAR, "r": 2, "num_vectors": 16, "vector_length": 4}),
    "VERA": ("gpt2", {**LINEAR, "r": 8}),
    "WAVEFT": ("vit", {**LINEAR, "n_frequency": 50}),
}
SINGLE = ("PSOFT",)  # refuses float64
MADE = ("CPT", "P_TUNING")  # saved as the tokens that their network makes, not as the network

STOCK = [  # what stock peft warns of when it loads an export: nothing that we call
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:fan_in_fan_out is set to False but the target module is .Conv1D:UserWarning",
    "ignore:Unsupported layer type .* encountered, proceed at your own risk:UserWarning",  # LN tuning of any norm
    "ignore:Failed to load the CUDA extension:UserWarning",  # BOFT without a GPU
    "ignore:Setting boft_n_butterfly_factor to 1:UserWarning",
]
# torch, of the first forward of FRoD or SHiRA
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
each_tuner = pytest.mark.parametrize("name", TUNERS)


def put(name, tiny, seed=0):
    kind, options = TUNERS[name]
    return Tuner(name, options).attach(tiny(kind, torch.float32 if name in SINGLE else torch.float64), seed)


def local(adapted, broadcast, client, examples, rows):
    work = Training(steps=2, batch=4, lr=0.01, optimizer="adamw")
    job = Job(client, broadcast, torch.arange(rows), work, seeds.generator(0, client=client, purpose="batches"))
    return train(adapted, Phase(), examples(adapted.base, seed=client), job, round=0)[0]


def everything(adapted):
    """All tensors of the model, also those that are not saved."""
    module = adapted.module
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}


@pytest.mark.fast
def test_every_tuner_of_the_installed_peft_is_listed():
    assert TUNERS.keys() | CANNOT.keys() == {tuner.name for tuner in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert not TUNERS.keys() & CANNOT.keys()


@each_tuner
def test_two_clients_federate_for_a_round(name, tiny, examples, batch):
    server, client = put(name, tiny), put(name, tiny)  # two machines
    inputs = batch(server.base)
    start, logits = server.read(), server.logits(inputs)
    trained = {id(parameter) for parameter in client.parameters.values()}
    frozen = {key: tensor.clone() for key, tensor in everything(client).items() if id(tensor) not in trained}

    strategy = FedAvg()
    state = strategy.init({"main": start})
    updates = [local(client, strategy.broadcast(state, 0, number), number, examples, rows) for number, rows in ((0, 12), (1, 8))]
    state = strategy.aggregate(state, 0, updates, weighted_mean)

    assert updates[0].tensors.keys() == updates[1].tensors.keys() == start.keys()
    for key, tensor in state.tensors.items():
        by_hand = (12 * updates[0].tensors[key].double() + 8 * updates[1].tensors[key].double()) / 20
        assert torch.allclose(tensor.double(), by_hand, atol=1e-7 if name in SINGLE else 1e-14)
    moved = [key for key in start if not torch.equal(state.tensors[key], start[key])]
    assert any(not key.startswith("head.") for key in moved)
    assert not any(torch.equal(updates[0].tensors[key], updates[1].tensors[key]) for key in moved)

    server.write(state.tensors)
    client.write(state.tensors)
    assert not torch.allclose(server.logits(inputs), logits, atol=1e-6)
    assert torch.equal(server.logits(inputs), client.logits(inputs))
    now = everything(client)
    assert all(torch.equal(now[key], tensor) for key, tensor in frozen.items())


@each_tuner
def test_an_examples_logits_do_not_depend_on_its_batch(name, tiny, examples):
    adapted = put(name, tiny)
    rng = torch.Generator().manual_seed(0)
    adapted.write({key: t + 0.05 * torch.randn(t.shape, generator=rng).to(t.dtype) for key, t in adapted.read().items()})
    found = examples(adapted.base)
    together = adapted.logits(found.batch(torch.arange(6))[0])
    for row in range(6):
        alone = adapted.logits(found.batch(torch.tensor([row]))[0])[0]
        seen = together[row][: len(alone)] if alone.dim() == 2 else together[row]  # language: without the padding
        assert torch.allclose(alone, seen, atol=1e-5 if name in SINGLE else 1e-10)


@each_tuner
def test_what_is_drawn_depends_on_the_seed_alone(name, tiny):
    one = put(name, tiny, seed=7)
    torch.manual_seed(99)
    two = put(name, tiny, seed=7)
    first, second = everything(one), everything(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "name", ["VERA", "PVERA", "RANDLORA", "FOURIERFT", "WAVEFT", "SHIRA", "VBLORA", "UNILORA", "TINYLORA", "ADALORA", "LOHA", "C3A", "HRA"]
)
def test_another_seed_draws_another_adapter(name, tiny):
    one, two = (put(name, tiny, seed=seed) for seed in (7, 8))
    rng = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(tensor.shape, generator=rng).double() for key, tensor in one.read().items()}
    start = [adapted.read() for adapted in (one, two)]
    one.write(tensors)
    two.write(tensors)
    inputs = {"pixel_values": torch.ones(1, 1, 8, 8).double()} if one.base.task == "image" else {"input_ids": torch.arange(3, 9)[None]}
    trained = any(not torch.equal(start[0][key], start[1][key]) for key in start[0])
    assert trained or not torch.allclose(one.logits(inputs), two.logits(inputs), atol=1e-6)  # what is trained, or what is frozen


@each_tuner
def test_undo_puts_the_base_back(name, tiny, batch):
    kind, options = TUNERS[name]
    base = tiny(kind, torch.float32 if name in SINGLE else torch.float64)
    state = {key: tensor.clone() for key, tensor in base.module.state_dict().items()}
    modules, config, logits = dict(base.module.named_modules()), base.module.config.to_dict(), base.module(**batch(base)).logits
    attributes = {path: set(vars(inner)) for path, inner in modules.items()}
    adapted = Tuner(name, options).attach(base, seed=0)
    adapted.write({key: tensor + 1 for key, tensor in adapted.read().items()})
    adapted.logits(batch(base)).sum().backward()
    adapted.undo()
    assert dict(base.module.named_modules()) == modules
    assert {path: set(vars(inner)) for path, inner in modules.items()} == attributes
    assert base.module.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.module.state_dict().items())
    assert base.module.config.to_dict() == config
    assert torch.equal(base.module(**batch(base)).logits, logits)
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


@each_tuner
@pytest.mark.filterwarnings(*STOCK)
def test_stock_peft_loads_the_export(name, tiny, batch, tmp_path):
    adapted = put(name, tiny)
    rng = torch.Generator().manual_seed(0)
    tensors = {key: t + 0.05 * torch.randn(t.shape, generator=rng).to(t.dtype) for key, t in adapted.read().items()}
    adapted.export(tensors, tmp_path)
    kind = TUNERS[name][0]
    fresh = tiny(kind, torch.float32 if name in SINGLE else torch.float64).module
    stock = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    inputs = batch(adapted.base)
    theirs = stock(**inputs).logits
    theirs = theirs if theirs.dim() == 2 else theirs[:, -inputs["input_ids"].shape[1] :]
    assert torch.allclose(theirs, adapted.logits(inputs), atol=1e-6 if name in SINGLE else 1e-10)
    held = {key.replace(".modules_to_save.default", ""): tensor for key, tensor in stock.named_parameters()}
    ours = dict(adapted.module.named_parameters())
    if name not in MADE:
        assert all(torch.equal(held[key], tensor) for key, tensor in ours.items() if tensor.requires_grad)


@pytest.mark.fast
@pytest.mark.parametrize("name", CANNOT)
def test_a_tuner_that_cannot_be_federated_says_why(name, tiny):
    with pytest.raises(ValueError, match=rf"adapter\.type={name} cannot be federated: {CANNOT[name][:20]}.*; there are ADALORA, ADAMSS"):
        Tuner(name).attach(tiny("llama"), seed=0)


@pytest.mark.fast
def test_lily_still_mixes_the_examples_of_a_batch(tiny, examples):
    base = tiny("llama")
    adapted = attach(base, peft.LilyConfig(r=4, target_modules="all-linear"), 0)
    rng = torch.Generator().manual_seed(0)
    adapted.write({key: torch.randn(tensor.shape, generator=rng) for key, tensor in adapted.read().items()})
    found = examples(base)
    rows = torch.tensor([0, 5])  # of equal length
    one, two = adapted.logits(found.batch(rows)[0]), adapted.logits(found.batch(rows[:1])[0])
    assert not torch.allclose(one[0], two[0], atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    "config",
    [peft.PolyConfig(target_modules=["q_proj"]), peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")],
    ids=["POLY", "MULTITASK_PROMPT_TUNING"],
)
def test_poly_and_multitask_prompts_still_need_the_task_of_each_example(config, tiny, batch):
    base = tiny("llama")
    adapted = attach(base, config, 0)
    with pytest.raises(ValueError, match="task_ids"):
        adapted.logits(batch(base))


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:No value was provided for .adapters.:UserWarning")
def test_xlora_still_trains_nothing_without_finished_adapters(tiny):
    base = tiny("llama")
    base.module.config.use_cache = False
    adapted = attach(base, peft.XLoraConfig(hidden_size=24), 0)
    assert sum(tensor.numel() for tensor in adapted.read().values()) == 0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "tuner", "message"),
    [
        ("vit", Tuner("LORAX"), r"adapter\.type=LORAX is not a tuner of peft \d.*; there are ADALORA, .*VERA"),
        ("vit", Tuner("ia3", {"rank": 4}), r"adapter\.options\.rank is not a field of IA3Config; there are .*target_modules"),
        ("vit", Tuner("ADALORA", {**LINEAR, "target_r": 4}), r"adapter\.options\.target_r would do nothing.*; leave it out"),
        ("vit", Tuner("VERA", {**LINEAR, "vera_dropout": 0.1}), r"vera_dropout=0\.1: clients train without dropout.*; leave it out"),
        (
            "vit",
            Tuner("LORA", {**LINEAR, "init_lora_weights": "pissa_niter_4"}),
            r"=pissa_niter_4 changes the frozen weights.*choose gaussian",
        ),
        ("vit", Tuner("BOFT", {**LINEAR, "boft_block_size": 0}), r"adapter\.options: Either `boft_block_size` or `boft_block_num` must"),
        ("vit", Tuner("C3A", {**LINEAR, "block_size": 7}), r"peft cannot put C3A on this ViTForImageClassification: The block size should"),
        ("vit", Tuner("PREFIX_TUNING", {"num_virtual_tokens": 3}), r"tokens before a text, .* task is image; choose adapter=visual_prompt"),
        (
            "gpt2_classifier",
            Tuner("PROMPT_TUNING", {"num_virtual_tokens": 3}),
            r"reads the class at the end of the padding.*adapter=prefix",
        ),
        ("gpt2", Tuner("OSF", LINEAR), r"peft cannot put OSF on this GPT2LMHeadModel: no layer is of a kind that it adapts; its layers"),
        ("vit", Tuner("IA3"), r"Please specify `target_modules`.*; its layers .* are classifier, fc1, fc2, k_proj, o_proj, q_proj, v_proj"),
        ("vit", Tuner("HRA", {"target_modules": ["fc1", "fc3"]}), r"no layer is called fc3; its layers"),
        ("vit", Tuner("VERA", {"target_modules": ["classifier", "fc1"]}), r"its targets reach the task head, which is trained whole"),
        (
            "bert",
            Tuner("PROMPT_TUNING"),
            r"adapter\.options\.num_virtual_tokens is not set; for instance adapter\.options\.num_virtual_tokens=20",
        ),
    ],
)
def test_what_does_not_fit_is_said_and_the_base_stays_clean(kind, tuner, message, tiny, batch):
    base = tiny(kind)
    modules, logits = list(base.module.modules()), base.module(**batch(base)).logits
    with pytest.raises(ValueError, match=message):
        tuner.attach(base, seed=0)
    assert list(base.module.modules()) == modules
    assert torch.equal(base.module(**batch(base)).logits, logits)


@pytest.mark.parametrize("name", [name for name, (_, options) in TUNERS.items() if options.get("target_modules") == "all-linear"])
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_all_linear_layers_are_those_below_the_head(name, kind, tiny):
    base = tiny(kind, torch.float32)
    heads = {"classifier", "score", "lm_head"}
    linear = {path for path, inner in base.module.named_modules() if isinstance(inner, torch.nn.Linear)} - heads
    adapted = Tuner(name, TUNERS[name][1]).attach(base, seed=0)
    wrapped = {path for path, inner in base.module.named_modules() if hasattr(inner, "base_layer")}
    assert wrapped == linear
    assert {key for key in adapted.parameters if key.startswith("head.")} == {f"head.{key}" for key in base.head}
    assert all(adapted.parameters[f"head.{key}"] is base.module.get_parameter(key) for key in base.head)


@pytest.mark.fast
@pytest.mark.parametrize("excluded", [["fc2"], r".*fc2"])
def test_layers_can_be_excluded_beside_the_head(excluded, tiny):
    tensors = Tuner("LORA", {**LINEAR, "r": 4, "exclude_modules": excluded}).attach(tiny("vit"), seed=0).read()
    assert {key.split(".")[-3] for key in tensors if "lora_A" in key} == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1"}
