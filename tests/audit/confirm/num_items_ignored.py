"""`forward` takes **kwargs, so Trainer trusts it to divide by `num_items_in_batch`; the loss ignores that number."""

import torch
import transformers

SMALL = dict.fromkeys(
    "d_model hidden_size d_ff decoder_ffn_dim encoder_ffn_dim ffn_dim embed_dim dim_ff dff".split(), 32
)
SMALL |= dict.fromkeys("decoder_layers encoder_layers num_layers num_decoder_layers num_encoder_layers".split(), 2)
SMALL |= dict.fromkeys("decoder_attention_heads encoder_attention_heads num_decoder_attention_heads".split(), 4)
SMALL |= dict.fromkeys(
    "num_encoder_attention_heads num_heads n_heads attention_heads n_head n_layers n_layer".split(), 4
)
SMALL |= dict.fromkeys("dropout attention_dropout activation_dropout dropout_rate summary_last_dropout".split(), 0.0)
SMALL |= {"vocab_size": 99, "d_kv": 8, "pad_token_id": 0, "decoder_start_token_id": 2, "emb_dim": 32, "d_inner": 32}
SMALL |= {"src_vocab_size": 99, "tgt_vocab_size": 99, "dim_head": 8, "attention_type": "original_full", "d_head": 8}
SMALL |= {"num_experts": 4, "attention_window": 8, "suppress_tokens": None, "begin_suppress_tokens": None}
NAMES = """BartForCausalLM BartForConditionalGeneration BigBirdPegasusForCausalLM
BigBirdPegasusForConditionalGeneration
BlenderbotForCausalLM BlenderbotForConditionalGeneration BlenderbotSmallForCausalLM
BlenderbotSmallForConditionalGeneration CpmAntForCausalLM FSMTForConditionalGeneration LEDForConditionalGeneration
LongT5ForConditionalGeneration M2M100ForConditionalGeneration MBartForCausalLM MBartForConditionalGeneration
MT5ForConditionalGeneration MarianForCausalLM MarianMTModel MvpForCausalLM MvpForConditionalGeneration
NllbMoeForConditionalGeneration PLBartForCausalLM PLBartForConditionalGeneration PegasusForCausalLM
PegasusForConditionalGeneration PegasusXForConditionalGeneration ProphetNetForCausalLM
ProphetNetForConditionalGeneration SeamlessM4TForTextToText SeamlessM4Tv2ForTextToText
SwitchTransformersForConditionalGeneration T5ForConditionalGeneration TrOCRForCausalLM UMT5ForConditionalGeneration
WhisperForCausalLM XLMWithLMHeadModel XLNetLMHeadModel"""
PART = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
PART |= {"num_key_value_heads": 4, "vocab_size": 99}
SPEECH = {"text_config": PART | {"model_type": "granite"}, "audio_token_index": 98}
SPEECH |= {"encoder_config": {"hidden_dim": 32, "num_layers": 1, "num_heads": 4, "dim_head": 8, "context_size": 16}}
SPEECH |= {"projector_config": PART | {"model_type": "blip_2_qformer", "encoder_hidden_size": 32}}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32}
BERT, DECODER = PART | {"model_type": "bert"}, {"is_decoder": True, "add_cross_attention": True}
NESTED = {
    "GraniteSpeechForConditionalGeneration": SPEECH,
    "GraniteSpeechPlusForConditionalGeneration": SPEECH,
    "Qwen2AudioForConditionalGeneration": {"text_config": PART, "audio_config": AUDIO, "audio_token_index": 98},
    "EncoderDecoderModel": {
        "encoder": BERT,
        "decoder": BERT | DECODER,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
    },
}
transformers.logging.set_verbosity_error()
for name in [*NAMES.split(), *NESTED]:
    kind = getattr(transformers, name)
    known = kind.config_class().to_dict() if name not in NESTED else {}
    known |= {"decoder_start_token_id": 2} if known.get("is_encoder_decoder") else {}
    small = {key: value for key, value in SMALL.items() if key in known}
    model = kind(kind.config_class(**NESTED.get(name, small))).eval()
    arguments = transformers.TrainingArguments("unused", use_cpu=True, report_to="none")
    trusted = transformers.Trainer(model, arguments).model_accepts_loss_kwargs
    ids = torch.randint(5, 99, (2, 32))
    mean, divided = (
        model(input_ids=ids, labels=ids, num_items_in_batch=n).loss.mean() for n in (None, torch.tensor(1000))
    )
    if trusted and torch.isclose(mean, divided):
        print(f"CONFIRMED {name}: loss {mean:.4f}, {divided:.4f} with num_items_in_batch=1000", flush=True)
