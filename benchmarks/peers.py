"""The models of other libraries that more than one benchmark runs."""


def marian(sizes, dropout=0.0):
    """Hugging Face's encoder-decoder, which ends no sentence of its own accord."""
    import transformers

    config = transformers.MarianConfig(
        vocab_size=sizes["vocabulary"],
        decoder_vocab_size=sizes["vocabulary"],
        d_model=sizes["dim"],
        encoder_layers=sizes["layers"],
        decoder_layers=sizes["layers"],
        encoder_attention_heads=sizes["heads"],
        decoder_attention_heads=sizes["heads"],
        encoder_ffn_dim=sizes["inner"],
        decoder_ffn_dim=sizes["inner"],
        dropout=dropout,
        attention_dropout=dropout,
        activation_function="relu",
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    return transformers.MarianMTModel(config)


def bert_config(sizes, dropout=0.0, **more):
    """Hugging Face's, for any of its BERTs."""
    import transformers

    return transformers.BertConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["dim"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["dim"],
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **more,
    )


def keras_hub_bert(sizes, dropout=0.0):
    """KerasHub's encoder."""
    import keras_hub

    return keras_hub.models.BertBackbone(
        vocabulary_size=sizes["vocabulary"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        hidden_dim=sizes["dim"],
        intermediate_dim=4 * sizes["dim"],
        dropout=dropout,
        max_sequence_length=512,
    )
