"""Baton's worker side. The life of an attempt, file by file:

    worker     the process: claims tickets, stops in order
    executor   one attempt under a lease: claim, generate, then complete, park, fail or release
    isolated   an attempt in a process of its own, for jobs that may kill theirs
    generate   the artifact: load events -> context -> provider -> ground -> render
    context    events -> what a provider reads
    breaker    is the provider there? while it is not, jobs wait
    calls      what a provider tells: progress, and each call of a model
    providers  who turns context into a draft; `extractive` is the built-in one
    plain      texts of a draft -> texts that do nothing, however they are shown
    render     draft -> Markdown
    outcomes   how an attempt can end

What a model reads, when one writes the artifact:

    selection  which events matter most, threads together
    tokens     how many tokens a text is at most
    briefs     the events as compact text under a budget, with ids that a model can cite

A language model as the provider:

    drafting   briefs -> what it answers -> a draft, repaired once, from several parts if need be
    prompts    what it is asked
    chat       one request: its bounds, and what each way to fail means
    openai_chat, anthropic_chat    the vendors' SDKs behind it
    replies    what it wrote -> a draft that cites what it was shown

Beside the attempts, webhooks go out:

    delivery   what is due -> signed -> sent -> noted
    outbound   a POST to an address that a stranger chose

How `extractive` reads, from an event up to an artifact:

    lines, references, paths, kinds, cues    what a text, a path or a sentence tells
    signals                                  one event, read
    changes, reading                         events together: what is one change, what is open
    statements, passages, areas              what may be said, and what several artifacts say
    handoff, notes, onboarding, architecture, correlation    an artifact each

Of `app/` it sees only what both sides share: logs, settings, background, connector, schemas, db,
queue, sweeper.
"""
