#!/usr/bin/env python3
"""Makes the golden files of `crates/attn-core/tests/golden` with Hugging Face transformers.

    python3 -m venv /path/to/venv
    /path/to/venv/bin/pip install torch==2.11.0 transformers==5.23.0 peft==0.21.2
    /path/to/venv/bin/python scripts/make_goldens.py [--out FOLDER] [--only NAME]

Each case is an ordinary model folder of a small random model, `config.json` and safetensors as `save_pretrained`
writes them (a few are edited afterwards, to spell the same model as older or other programs do), and beside them
`expected.safetensors`: what transformers computes from exactly that folder with eager attention in f32, for several
probes. A probe `left` is the tensors

    left.input_ids          i64 [batch, seq_len]
    left.attention_mask     i64 [batch, seq_len], 1 is a real token; absent: all are
    left.position_ids       i64 [batch, seq_len], only where the probe gives positions
    left.token_type_ids     i64 [batch, seq_len], only where the probe gives them
    left.logits             f32 [batch, seq_len, vocab_size] or [batch, n_labels]; absent for a model without a head
    left.hidden_states.{i}  f32 [batch, seq_len, hidden_size], i from 0 to n_layers
    left.attentions.{l}     f32 [batch, n_heads, seq_len, seq_len]

The file's metadata has one entry `golden`, a JSON object: the versions of torch and transformers, the case's
description, and for each probe where its positions come from:

    given   `position_ids` above
    count   the real tokens counted, `cumsum(mask) - 1`, at least 0; transformers was handed these
    arange  0, 1, 2, ... whatever the mask, which is what transformers does by itself

Values where the mask is 0 are whatever transformers left there and say nothing.

What transformers' `output_hidden_states` holds: entry 0 enters the first layer (GPT-2: token plus position
embedding; BERT and DistilBERT: after the embeddings' layer norm; Llama: the token embedding), entry i leaves layer
i, and the last is the model's `last_hidden_state`: in GPT-2 and Llama after the final norm, so that what leaves the
last layer before that norm is not in the list.

How classifiers pool: GPT-2 and Llama take the rightmost token that is not `pad_token_id`; no probe uses that id for
a real token, so this is the last token whose mask is 1. BERT and DistilBERT take whatever stands first, which is
padding where rows are padded on the left: there the expected logits are those of each row alone and unpadded.

The cases named in GENERATED also hold `generated.json`, what transformers' greedy `generate` makes of prompts of
several lengths, one by one: `{"runs": [{"prompt": [..], "repetition_penalty": 1.0, "expected": [..]}]}`, `expected`
without the prompt. A prompt is used only if at every step the likeliest token leads by a margin that rounding cannot
close, so that equal output is owed.

The cases named in ADAPTED also hold a folder `adapter`, a LoRA adapter as PEFT saves it, with beside it `expected.safetensors`: `input_ids` and PEFT's `logits`.

Running again on the same kind of CPU gives the same bytes: every draw comes from a generator seeded with the case's
name, on one thread, and the metadata is one entry because safetensors writes several in no fixed order. Another CPU
may round the last bits of `expected.safetensors` differently; configs and weights are the same everywhere.
"""

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

GOLDEN = Path(__file__).resolve().parent.parent / "crates" / "attn-core" / "tests" / "golden"
PAD = 0
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# Cases whose greedy output is kept, too.
GENERATED = ("gpt2_lm_tied", "gpt2_published", "llama_lm_untied", "llama_llama3", "llama_multi_query")
# Cases with an adapter: what PEFT's LoraConfig is told.
ADAPTED = {
    "gpt2_lm_tied": dict(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    "llama_lm_untied": dict(
        r=2, lora_alpha=7, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 3},
        alpha_pattern={"v_proj": 4},
    ),
    "distilbert_classifier_2": dict(
        r=2, lora_alpha=2, target_modules=["q_lin", "v_lin"], modules_to_save=["pre_classifier", "classifier"]
    ),
}
# The least lead, in nats, of each token generated over the next.
MARGIN = 1e-3

ALL_LM_PROBES = ("plain", "right", "left", "arange", "positions", "single", "holes")
CLASSIFIER_PROBES = ("plain", "right", "left", "single", "holes")
ENCODER_CLASSIFIER_PROBES = ("plain", "right", "left", "single")
# Transformers pools a decoder without `pad_token_id` at the last place and refuses more than one row.
NO_PAD_PROBES = ("one_row", "single")


@dataclass
class Case:
    """One model folder and what to ask of it."""

    name: str
    what: str
    model: str
    config: dict
    probes: tuple[str, ...] = ("left",)
    dtype: str = "f32"
    edit: Callable[[Path], None] | None = None
    max_shard_size: str = "1GB"


# Sizes differ on purpose: no two extents of a model that could be swapped by mistake are equal.


def gpt2(**over) -> dict:
    base = dict(
        vocab_size=23, n_positions=16, n_embd=8, n_head=2, n_layer=2, n_inner=12, bos_token_id=1, eos_token_id=1
    )
    return base | over


def distilbert(**over) -> dict:
    base = dict(
        vocab_size=23, max_position_embeddings=16, dim=8, n_heads=2, n_layers=2, hidden_dim=12, pad_token_id=PAD
    )
    return base | over


def bert(**over) -> dict:
    base = dict(
        vocab_size=23,
        max_position_embeddings=16,
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=12,
        pad_token_id=PAD,
    )
    return base | over


def llama(**over) -> dict:
    base = dict(
        vocab_size=23,
        max_position_embeddings=64,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=12,
        bos_token_id=1,
        eos_token_id=2,
    )
    return base | over


def labels(n: int) -> dict:
    return dict(id2label={i: f"class {i}" for i in range(n)}, label2id={f"class {i}": i for i in range(n)})


def rope(kind: str, theta: float = 10000.0, **settings) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **settings))


# Wavelengths 6.3, 13.7, 29.7, 64.6, ...: with 32 positions originally and factors 1 and 4 the first stays, the second
# and third are blended, the rest is stretched.
LLAMA3 = rope(
    "llama3", theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)


# Edits: the same model, spelled as other programs spell it.


def edit_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config, indent=2) + "\n")

    return edit


def keep_only(*keys: str) -> Callable[[Path], None]:
    """Leaves the sizes alone, so that every other setting is the architecture's default."""

    def change(config: dict) -> None:
        for key in set(config) - {"model_type", "architectures", *keys}:
            del config[key]

    return edit_config(change)


def as_transformers_4(config: dict) -> None:
    """`rope_theta` beside `rope_scaling`, and `torch_dtype`: what the Hub's Llama folders hold."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")


def as_first_linear(config: dict) -> None:
    """The oldest spelling: `type` for `rope_type`."""
    as_transformers_4(config)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")


def rewrite_weights(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def as_published_gpt2(folder: Path) -> None:
    """`openai-community/gpt2` and its kin: no `transformer.` prefix, and the causal masks stored as buffers."""

    def change(weights: dict) -> dict:
        config = json.loads((folder / "config.json").read_text())
        renamed = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        n = config["n_positions"]
        for layer in range(config["n_layer"]):
            renamed[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
            renamed[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return renamed

    rewrite_weights(folder, change)


def as_published_bert(folder: Path) -> None:
    """`google-bert/bert-base-uncased`: layer norms with `gamma` and `beta`."""

    def rename(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite_weights(folder, lambda weights: {rename(name): weight for name, weight in weights.items()})


GPT2, GPT2_CLASSIFIER = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
DISTIL, DISTIL_CLASSIFIER = "DistilBertForMaskedLM", "DistilBertForSequenceClassification"
BERT, BERT_CLASSIFIER = "BertForMaskedLM", "BertForSequenceClassification"
LLAMA, LLAMA_CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"

CASES = [
    Case(
        "gpt2_lm_tied",
        "language model, tied, gelu_new, inner width left to its default",
        GPT2,
        gpt2(vocab_size=40, n_positions=24, n_embd=16, n_inner=None),
        ALL_LM_PROBES,
    ),
    Case(
        "gpt2_lm_untied",
        "language model, untied; three heads, three layers",
        GPT2,
        gpt2(tie_word_embeddings=False, n_embd=12, n_head=3, n_layer=3),
        ("plain", "left"),
    ),
    Case("gpt2_relu", "activation relu", GPT2, gpt2(activation_function="relu")),
    Case("gpt2_gelu", "activation gelu (erf)", GPT2, gpt2(activation_function="gelu")),
    Case("gpt2_gelu_pytorch_tanh", "activation gelu_pytorch_tanh", GPT2, gpt2(activation_function="gelu_pytorch_tanh")),
    Case("gpt2_silu", "activation silu", GPT2, gpt2(activation_function="silu")),
    Case("gpt2_unscaled", "scale_attn_weights false", GPT2, gpt2(scale_attn_weights=False)),
    Case(
        "gpt2_inverse_layer",
        "scale_attn_by_inverse_layer_idx, three layers",
        GPT2,
        gpt2(scale_attn_by_inverse_layer_idx=True, n_embd=12, n_layer=3),
    ),
    Case(
        "gpt2_upcast",
        "reorder_and_upcast_attn with scale_attn_by_inverse_layer_idx, as Mistral's GPT-2 models",
        GPT2,
        gpt2(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
    ),
    Case("gpt2_eps", "a layer_norm_epsilon that shows", GPT2, gpt2(layer_norm_epsilon=0.03)),
    Case(
        "gpt2_classifier",
        "sequence classification, 2 labels, with pad_token_id",
        GPT2_CLASSIFIER,
        gpt2(pad_token_id=PAD, **labels(2)),
        CLASSIFIER_PROBES,
    ),
    Case(
        "gpt2_classifier_no_pad",
        "sequence classification, 3 labels, no pad_token_id",
        GPT2_CLASSIFIER,
        gpt2(**labels(3)),
        NO_PAD_PROBES,
    ),
    Case(
        "gpt2_defaults",
        "a config of sizes alone",
        GPT2,
        gpt2(n_inner=None),
        edit=keep_only("vocab_size", "n_positions", "n_embd", "n_head", "n_layer"),
    ),
    Case("gpt2_published", "names and mask buffers of the Hub's gpt2", GPT2, gpt2(), edit=as_published_gpt2),
    Case("gpt2_f16", "weights stored in f16", GPT2, gpt2(n_embd=16), dtype="f16"),
    Case("gpt2_bf16", "weights stored in bf16", GPT2, gpt2(n_embd=16), dtype="bf16"),
    Case(
        "distilbert_mlm_tied",
        "masked language model, tied, gelu",
        DISTIL,
        distilbert(vocab_size=40, max_position_embeddings=24, dim=16, n_heads=4, hidden_dim=24),
        ALL_LM_PROBES,
    ),
    Case(
        "distilbert_mlm_untied",
        "masked language model, untied; three heads, three layers",
        DISTIL,
        distilbert(tie_word_embeddings=False, dim=12, n_heads=3, n_layers=3),
        ("plain", "left"),
    ),
    Case(
        "distilbert_classifier_2",
        "sequence classification, 2 labels",
        DISTIL_CLASSIFIER,
        distilbert(**labels(2)),
        ENCODER_CLASSIFIER_PROBES,
    ),
    Case(
        "distilbert_classifier_3",
        "sequence classification, 3 labels",
        DISTIL_CLASSIFIER,
        distilbert(**labels(3)),
        ("right",),
    ),
    Case("distilbert_bare", "no head", "DistilBertModel", distilbert(), ("plain", "left")),
    Case("distilbert_sinusoidal", "sinusoidal_pos_embds", DISTIL, distilbert(sinusoidal_pos_embds=True)),
    Case("distilbert_relu", "activation relu, in the head too", DISTIL, distilbert(activation="relu")),
    Case("distilbert_gelu_new", "activation gelu_new", DISTIL, distilbert(activation="gelu_new")),
    Case(
        "distilbert_defaults",
        "a config of sizes alone",
        DISTIL,
        distilbert(),
        edit=keep_only("vocab_size", "max_position_embeddings", "dim", "n_heads", "n_layers", "hidden_dim"),
    ),
    Case("distilbert_f16", "weights stored in f16", DISTIL, distilbert(dim=16), dtype="f16"),
    Case("distilbert_bf16", "weights stored in bf16", DISTIL, distilbert(dim=16), dtype="bf16"),
    Case(
        "bert_mlm_tied",
        "masked language model, tied, gelu",
        BERT,
        bert(vocab_size=40, max_position_embeddings=24, hidden_size=16, num_attention_heads=4, intermediate_size=24),
        (*ALL_LM_PROBES, "token_types"),
    ),
    Case(
        "bert_mlm_untied",
        "masked language model, untied: of the head's two biases only the decoder's counts",
        BERT,
        bert(tie_word_embeddings=False, hidden_size=12, num_attention_heads=3),
        ("plain", "left"),
    ),
    Case(
        "bert_classifier",
        "sequence classification, 2 labels, three token types",
        BERT_CLASSIFIER,
        bert(type_vocab_size=3, **labels(2)),
        (*ENCODER_CLASSIFIER_PROBES, "token_types"),
    ),
    Case(
        "bert_relu_eps",
        "activation relu and a layer_norm_eps that shows",
        BERT,
        bert(hidden_act="relu", layer_norm_eps=0.03),
    ),
    Case(
        "bert_defaults",
        "a config of sizes alone",
        BERT,
        bert(),
        edit=keep_only(
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "intermediate_size",
        ),
    ),
    Case(
        "bert_published",
        "layer norms named gamma and beta, as the Hub's bert-base-uncased",
        BERT,
        bert(),
        edit=as_published_bert,
    ),
    Case("bert_bf16", "weights stored in bf16", BERT, bert(hidden_size=16), dtype="bf16"),
    Case(
        "llama_lm_untied",
        "language model, untied, 8 query heads on 2 key/value heads",
        LLAMA,
        llama(vocab_size=40, num_attention_heads=8, head_dim=4, intermediate_size=24),
        ALL_LM_PROBES,
    ),
    Case(
        "llama_lm_tied",
        "language model, tied, as many key/value heads as query heads",
        LLAMA,
        llama(tie_word_embeddings=True, num_key_value_heads=4),
        ("plain", "left"),
    ),
    Case("llama_multi_query", "one key/value head", LLAMA, llama(num_key_value_heads=1)),
    Case("llama_head_dim", "head_dim 6 where hidden_size / n_heads is 4", LLAMA, llama(head_dim=6), ("left", "far")),
    Case("llama_biases", "attention_bias and mlp_bias", LLAMA, llama(attention_bias=True, mlp_bias=True)),
    Case(
        "llama_gelu",
        "activation gelu and an rms_norm_eps that shows",
        LLAMA,
        llama(hidden_act="gelu", rms_norm_eps=0.03),
    ),
    Case("llama_theta", "rope_theta 50 under rope_parameters", LLAMA, llama(**rope("default", theta=50.0))),
    Case(
        "llama_theta_v4",
        "rope_theta 50 beside rope_scaling null",
        LLAMA,
        llama(**rope("default", theta=50.0)),
        edit=edit_config(as_transformers_4),
    ),
    Case("llama_linear", "linear rope scaling under rope_parameters", LLAMA, llama(**rope("linear", factor=2.5))),
    Case(
        "llama_linear_v4",
        "linear rope scaling as rope_scaling.type",
        LLAMA,
        llama(**rope("linear", factor=2.5)),
        edit=edit_config(as_first_linear),
    ),
    Case(
        "llama_llama3",
        "Llama 3 rope scaling, also past the original context",
        LLAMA,
        llama(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, **LLAMA3),
        ("left", "long", "far"),
    ),
    Case(
        "llama_llama3_v4",
        "Llama 3 rope scaling as rope_scaling, past the original context",
        LLAMA,
        llama(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, **LLAMA3),
        ("long",),
        edit=edit_config(as_transformers_4),
    ),
    Case(
        "llama_classifier",
        "sequence classification, 2 labels, with pad_token_id",
        LLAMA_CLASSIFIER,
        llama(pad_token_id=PAD, **labels(2)),
        CLASSIFIER_PROBES,
    ),
    Case(
        "llama_classifier_no_pad",
        "sequence classification, 3 labels, no pad_token_id",
        LLAMA_CLASSIFIER,
        llama(**labels(3)),
        NO_PAD_PROBES,
    ),
    Case(
        "llama_defaults",
        "a config of sizes alone",
        LLAMA,
        llama(num_key_value_heads=None),
        edit=keep_only(
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "intermediate_size",
        ),
    ),
    Case("llama_sharded", "weights in several files with an index", LLAMA, llama(), max_shard_size="6KB"),
    Case("llama_f16", "weights stored in f16", LLAMA, llama(), dtype="f16"),
    Case("llama_bf16", "weights stored in bf16", LLAMA, llama(), dtype="bf16"),
]


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew: as transformers starts them, biases are 0 and norms 1, which hides mistakes."""

    def normal(parameter: torch.Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    keep_table = getattr(model.config, "sinusoidal_pos_embds", False)
    done = set()
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                # A tied parameter belongs to several modules and is drawn by the first.
                if id(parameter) in done or (keep_table and module_name.endswith("position_embeddings")):
                    continue
                done.add(id(parameter))
                if isinstance(module, torch.nn.Embedding):
                    normal(parameter, 0.7)
                elif isinstance(module, (torch.nn.Linear, Conv1D)) and name == "weight":
                    fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[1]
                    # 1.2 spreads the attention scores without sharpening them to one key.
                    normal(parameter, 1.2 / math.sqrt(fan_in))
                elif name == "weight":
                    normal(parameter, 0.2, mean=1.0)
                else:
                    normal(parameter, 0.2)


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded(lengths: list[int], side: str) -> torch.Tensor:
    seq_len = max(lengths)
    rows = [[1] * n + [0] * (seq_len - n) for n in lengths]
    return torch.tensor(rows if side == "right" else [row[::-1] for row in rows])


def make_probe(name: str, config, generator: torch.Generator) -> dict:
    """Input tensors of a probe, and under `positions` where its positions come from."""

    def ids(batch: int, seq_len: int) -> torch.Tensor:
        # From 1: the padding id never stands for a real token.
        return torch.randint(PAD + 1, config.vocab_size, (batch, seq_len), generator=generator)

    def masked(mask: torch.Tensor) -> dict:
        return dict(input_ids=torch.where(mask == 1, ids(*mask.shape), PAD), attention_mask=mask, positions="count")

    match name:
        case "plain":
            return dict(input_ids=ids(2, 7), positions="count")
        case "one_row":
            return dict(input_ids=ids(1, 7), positions="count")
        case "single":
            return dict(input_ids=ids(1, 1), positions="count")
        case "right":
            return masked(padded([4, 9, 1], "right"))
        case "left":
            return masked(padded([4, 7], "left"))
        case "arange":
            return masked(padded([5, 8], "left")) | dict(positions="arange")
        case "holes":
            return masked(torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1, 1]]))
        case "positions":
            given = torch.tensor([[3, 3, 0, 9, 1, 7], [11, 10, 9, 8, 7, 6]])
            # With positions and no mask, transformers may take a step back in them for the start of another text.
            return dict(
                input_ids=ids(2, 6), attention_mask=torch.ones_like(given), position_ids=given, positions="given"
            )
        case "far":
            # Angles of a thousand turns: f32 rounding of the frequencies shows.
            given = torch.tensor([[900, 1500, 1501, 2047, 4095, 8191]])
            return dict(
                input_ids=ids(1, 6), attention_mask=torch.ones_like(given), position_ids=given, positions="given"
            )
        case "long":
            return dict(input_ids=ids(1, 40), positions="count")
        case "token_types":
            mask = padded([6, 4], "right")
            types = torch.randint(0, config.type_vocab_size, mask.shape, generator=generator)
            return masked(mask) | dict(token_type_ids=types)
    raise ValueError(f"no probe is called `{name}`")


def inputs_of(probe: dict) -> dict[str, torch.Tensor]:
    return {key: value for key, value in probe.items() if key != "positions"}


def run(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    values = {} if "logits" not in out else {"logits": out.logits}
    values |= {f"hidden_states.{i}": state for i, state in enumerate(out.hidden_states)}
    values |= {f"attentions.{layer}": weights for layer, weights in enumerate(out.attentions)}
    return values


def real_tokens(probe: dict) -> torch.Tensor:
    return probe.get("attention_mask", torch.ones_like(probe["input_ids"])) == 1


def run_padded(model, probe: dict) -> dict[str, torch.Tensor]:
    inputs = inputs_of(probe)
    if probe["positions"] == "count" and "attention_mask" in probe:
        inputs["position_ids"] = count_positions(probe["attention_mask"])
    return run(model, inputs)


def run_rows_alone(model, probe: dict) -> list[dict[str, torch.Tensor]]:
    """The same row by row, from the real tokens alone: what masks and padding must come to."""
    rows = []
    for row, real in enumerate(real_tokens(probe)):
        inputs = {key: value[row : row + 1, real] for key, value in inputs_of(probe).items()}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if probe["positions"] == "arange":
            inputs["position_ids"] = torch.arange(len(real))[real].unsqueeze(0)
        rows.append(run(model, inputs))
    return rows


def at_real_tokens(key: str, value: torch.Tensor, probe: dict) -> list[torch.Tensor]:
    """What of an output stands at real tokens, row by row."""
    if key.startswith("attentions"):
        return [row[:, real][:, :, real] for row, real in zip(value, real_tokens(probe))]
    if value.dim() == 3:
        return [row[real] for row, real in zip(value, real_tokens(probe))]
    return list(value)


def relative_rms(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    actual, expected = (torch.cat([value.flatten() for value in values]).double() for values in (actual, expected))
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


def check_attentions(name: str, weights: torch.Tensor, probe: dict) -> None:
    """Hidden keys get nothing, and the weights are neither even nor all on one key: either would hide mistakes."""
    for row, real in zip(weights, real_tokens(probe)):
        assert (row[:, real][:, :, ~real] == 0).all(), f"{name}: a masked key is seen"
    rows = [row.flatten(0, 1) for row in at_real_tokens("attentions", weights, probe)]
    n_visible = torch.cat([(row > 0).sum(-1) for row in rows])
    entropy = torch.cat([torch.special.entr(row).sum(-1) for row in rows])
    evenness = (entropy / n_visible.log())[n_visible >= 4]
    if len(evenness) > 0:
        assert 0.2 < evenness.mean() < 0.99, f"{name}: evenness of the weights is {evenness.mean():.3f}"


def check_rounding(name: str, model, values: dict, probe: dict) -> None:
    """f32 with padding equals f64 without, to well below the 1e-5 that readers of the file allow themselves."""
    upcasting = [module for module in model.modules() if getattr(module, "reorder_and_upcast_attn", False)]
    for module in upcasting:
        module.reorder_and_upcast_attn = False  # Transformers' code for it insists on f32; the mathematics is the same.
    exact = run_rows_alone(model.double(), probe)
    model.float()
    for module in upcasting:
        module.reorder_and_upcast_attn = True
    for key, value in values.items():
        error = relative_rms(at_real_tokens(key, value, probe), [row[key][0] for row in exact])
        assert error < 2e-6, f"{name}.{key}: differs by {error:.1e} from f64 without padding"


def check_half(case: Case, folder: Path, probes: dict, expected: dict) -> float:
    """The worst error of transformers itself when it computes in the stored half precision."""
    model = load(case, folder, DTYPES[case.dtype])
    errors = []
    for name, probe in probes.items():
        for key, value in run_padded(model, probe).items():
            pair = (at_real_tokens(key, t, probe) for t in (value, expected[f"{name}.{key}"]))
            errors.append(relative_rms(*pair))
    assert max(errors) < 1.5e-2, f"{case.name}: {case.dtype} itself is off by {max(errors):.1e}"
    return max(errors)


def load(case: Case, folder: Path, dtype: torch.dtype):
    model_class = getattr(transformers, case.model)
    model, report = model_class.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"], f"{case.name}: {report}"
    return model.eval()


def generate(name: str, model) -> list[dict]:
    """Greedy continuations of prompts whose every step is decided clearly."""
    generator = seeded(f"{name}.generated")
    room = getattr(model.config, "n_positions", 64)
    runs = []
    for length, penalty in [(1, 1.0), (3, 1.0), (5, 1.0), (2, 1.3), (4, 1.3), (6, 1.7)]:
        for _ in range(100):
            prompt = torch.randint(2, model.config.vocab_size, (1, length), generator=generator)
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(24, room - length),
                do_sample=False,
                repetition_penalty=penalty,
                pad_token_id=PAD,
                eos_token_id=None,
                output_scores=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(out.scores).topk(2, -1).values  # scores: after the penalty
            if (best[..., 0] - best[..., 1]).min() > MARGIN:
                expected = out.sequences[0, length:].tolist()
                runs.append(dict(prompt=prompt[0].tolist(), repetition_penalty=penalty, expected=expected))
                break
        else:
            raise AssertionError(f"{name}: no prompt of {length} tokens is decided clearly")
    return runs


def adapt(name: str, model, folder: Path) -> None:
    """An adapter with random factors, saved by PEFT, and what the model with it computes."""
    generator = seeded(f"{name}.adapter")
    model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTED[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    ids = torch.randint(2, model.config.vocab_size, (2, 7), generator=generator)
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(json.dumps(str(folder.parent)), json.dumps(name)))  # No path of this machine.
    case = next(case for case in CASES if case.name == name)
    plain = peft.PeftModel.from_pretrained(load(case, folder.parent, torch.float32), folder)
    logits = plain.eval()(ids).logits.detach()
    with plain.disable_adapter():
        assert relative_rms([logits], [plain(ids).logits.detach()]) > 0.05, f"{name}: the adapter changes nothing"
    save_file({"input_ids": ids, "logits": logits.contiguous()}, folder / "expected.safetensors")


def make(case: Case, out: Path) -> str:
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    generator = seeded(case.name)

    model_class = getattr(transformers, case.model)
    model = model_class(model_class.config_class(**case.config))
    randomize(model, generator)
    model.to(DTYPES[case.dtype]).save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.edit is not None:
        case.edit(folder)

    # From the folder, not from the model at hand: what is expected follows from what is stored.
    model = load(case, folder, torch.float32)
    probes = {name: make_probe(name, model.config, generator) for name in case.probes}
    tensors = {}
    for name, probe in probes.items():
        values = run_padded(model, probe)
        if case.model in (DISTIL_CLASSIFIER, BERT_CLASSIFIER) and name == "left":
            values["logits"] = torch.cat([row["logits"] for row in run_rows_alone(model, probe)])
        for key, value in values.items():
            assert value.isfinite().all(), f"{case.name}: {name}.{key} is not finite"
            if key.startswith("attentions"):
                check_attentions(f"{case.name}: {name}.{key}", value, probe)
        check_rounding(f"{case.name}: {name}", model, values, probe)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in (inputs_of(probe) | values).items()}
    half_error = check_half(case, folder, probes, tensors) if case.dtype != "f32" else None

    facts = dict(
        what=case.what,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        probes={name: probe["positions"] for name, probe in probes.items()},
    )
    save_file(tensors, folder / "expected.safetensors", metadata={"golden": json.dumps(facts, sort_keys=True)})
    if case.name in GENERATED:
        runs = generate(case.name, load(case, folder, torch.float32))
        (folder / "generated.json").write_text(json.dumps({"runs": runs}) + "\n")
    if case.name in ADAPTED:
        adapt(case.name, load(case, folder, torch.float32), folder / "adapter")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    note = f"  {case.dtype} itself: {half_error:.1e}" if half_error is not None else ""
    return f"{case.name:26} {size / 1024:6.1f} KiB  {', '.join(probes)}{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN, help="folder of the cases (default: the repository's)")
    parser.add_argument("--only", help="make only the case of this name")
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = [case for case in CASES if args.only in (None, case.name)]
    if not cases:
        parser.error(f"no case is called `{args.only}`: {', '.join(case.name for case in CASES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        print(make(case, args.out))


if __name__ == "__main__":
    main()
