"""What this project rewards: a function from completions to numbers, the higher the better, named in recipe.yaml."""


def on_topic(completions, topic, **columns):
    """1 where the topic is named, less the share of twelve words that is missing or too much (at most 1).

    Called with a whole batch: `completions` are chat messages because the prompts are, `topic` is a column of the
    prompts, and all other columns are in `columns`. Returns one number per completion.
    """
    texts = [completion[0]["content"] for completion in completions]
    named = [float(word in text.lower()) for text, word in zip(texts, topic)]
    return [name - min(1.0, abs(len(text.split()) - 12) / 12) for text, name in zip(texts, named)]
