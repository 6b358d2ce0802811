"""Baton's HTTP side, and what both sides share.

Read top-down; a file imports only files above it:

    logs, settings, background, connector, embedded, schemas, history   stand alone
    db         the pool, the named queries, the errors of the database
    queue      tickets, and the bell that tells workers of new ones
    sweeper    brings back the jobs of dead workers; runs in every process
    errors     what a client is told when something is wrong
    wire       bytes to checked values, values to bytes
    limits     how much one caller may ask for
    auth       who is calling
    waits      requests that wait for a job to change
    events     activity in, and out again
    jobs       asking for an artifact and reading the job: the heart
    stream     the log of a job, for those who ask and those who follow
    resources  projects, handoffs, insights, filters
    webhooks   who is told how jobs end
    openapi    the document, made from the route table
    static     the page for people at /, from page/
    main       the route table and the application
    guard      the HTTP server, and what one client can hold of it
    client     the API as a client sees it
    mcp_server its tools for agents
    supervisor, terminal, operator, demo, __main__   the command line; the last one also starts
               `tasks`
"""

__version__ = "0.1.0"
