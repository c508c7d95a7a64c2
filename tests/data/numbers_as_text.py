"""A tokenizer whose ids can be read."""


class Numbers:
    """Numbers in decimal are the ids, so that a token can be its own place in the corpus."""
    vocab_size = 1000
    specials: dict[str, int] = {}

    def encode_batch(self, texts):
        return [[int(number) for number in text.split()] for text in texts]
