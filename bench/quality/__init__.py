"""How close do Baton's artifacts come to what maintainers wrote themselves?

    make quality                                        ARGS= another data directory
    BATON_PROVIDER=openai BATON_MODEL=… make quality    the same for a model, beside the built-in

    rule        when two texts speak of one change, and the scores that follow from it
    releases    the data set, and a release as what a provider reads
    ways        who makes a list of items from a release: a provider, and four plain baselines
    __main__    runs them over the data set and prints the tables

The built-in provider is tuned on `TUNE` and judged on `REPORT`; nobody looks at single items of the
latter. The one rule: the baselines are judged by the same rule, which knows nothing of Baton.
"""
