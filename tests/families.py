"""Small models of many families, of transformers' own classes, with random weights in Hugging Face folders."""
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

N_LAYERS, D_MODEL, VOCAB, WINDOW, EPS = 2, 48, 97, 6, 1e-5
HEADS = dict(num_hidden_layers=N_LAYERS, hidden_size=D_MODEL, num_attention_heads=4, vocab_size=VOCAB)
SHARED = HEADS | dict(num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32)
LLAMA_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                  original_max_position_embeddings=16)
LAYERS = ["sliding_attention", "full_attention"]
LOCAL_AND_GLOBAL = dict(sliding_attention=dict(rope_type="default", rope_theta=100.0),
                        full_attention=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))

CONFIGS = {  # family -> (class of the configuration, class of the model, options)
    "gpt2": (hf.GPT2Config, hf.GPT2LMHeadModel, dict(
        n_layer=N_LAYERS, n_embd=D_MODEL, n_head=4, n_positions=32, vocab_size=VOCAB)),
    "pythia": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, HEADS | dict(
        intermediate_size=64, max_position_embeddings=32, rotary_pct=0.5)),
    "opt": (hf.OPTConfig, hf.OPTForCausalLM, HEADS | dict(
        ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=D_MODEL)),
    "gpt-j": (hf.GPTJConfig, hf.GPTJForCausalLM, dict(
        n_layer=N_LAYERS, n_embd=D_MODEL, n_head=4, n_positions=32, vocab_size=VOCAB, rotary_dim=8, n_inner=64)),
    "phi": (hf.PhiConfig, hf.PhiForCausalLM, SHARED | dict(num_key_value_heads=4, partial_rotary_factor=0.5)),
    "llama-3": (hf.LlamaConfig, hf.LlamaForCausalLM, SHARED | dict(rope_parameters=LLAMA_ROPE)),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, SHARED | dict(sliding_window=WINDOW, head_dim=16)),
    "qwen-2.5": (hf.Qwen2Config, hf.Qwen2ForCausalLM, SHARED),
    "qwen-3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, SHARED | dict(head_dim=16)),
    "gemma-2": (hf.Gemma2Config, hf.Gemma2ForCausalLM, SHARED | dict(
        head_dim=16, query_pre_attn_scalar=9, sliding_window=WINDOW, layer_types=LAYERS)),
    "gemma-3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, SHARED | dict(
        head_dim=16, query_pre_attn_scalar=9, sliding_window=WINDOW, layer_types=LAYERS,
        rope_parameters=LOCAL_AND_GLOBAL)),
    "gpt-oss": (hf.GptOssConfig, hf.GptOssForCausalLM, SHARED | dict(
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, layer_types=LAYERS)),
    "qwen-3.5": (hf.Qwen3_5TextConfig, hf.Qwen3_5ForCausalLM, SHARED | dict(
        head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)),
}


def build(family):
    "A transformers model with random weights, so large that no bias is 0, no norm 1 and no pattern uniform."
    config, kind, options = CONFIGS[family]
    torch.manual_seed(0)
    model = kind(config(**options, attn_implementation="eager")).eval().requires_grad_(False)
    for p in model.parameters(): p += 0.15 * torch.randn_like(p)
    return model


def save(model, folder):
    "The folder that `load_model` reads, with a tokenizer of words that nothing needs but its being there."
    words = {"<bos>": 0, "<unk>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict(bos_token="<bos>", eos_token="<bos>", unk_token="<unk>", pad_token="<pad>")
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
