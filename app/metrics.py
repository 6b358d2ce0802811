"""What Baton counts and measures: every metric is declared here, and nowhere else.

A process counts here and app/exporter.py writes it out, each side its own part. The one rule: a
label has few values, which Baton chooses (a route and never a path, a kind, a status) or which are
bounded (`Words`). Ids, addresses and texts of clients are for the log.

Names follow Prometheus: base units, `_total` for what only grows. The transitions of jobs are the
verbs of schema.sql; each is counted by the process that made it, so the sum over all processes is
the truth, but for what an operator does in SQL.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from app import __version__

# When each counter was made: as many lines again, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # unannotated upstream

# None is the library's own, which has whatever other libraries put into it.
COMMON = CollectorRegistry()  # what both processes have
API = CollectorRegistry()
DATABASE = CollectorRegistry()  # what the API reads; left out while it cannot
WORKER = CollectorRegistry()


class Words:
    """Words that somebody else chooses, as values of a label: the first `most`, then `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, word: str) -> str:
        """The word, if there is still room for it."""
        if word not in self._known:
            if len(self._known) >= self._most:
                return "other"
            self._known.add(word)
        return word or "none"


MODELS = Words(50)  # a server may call its model anything
OUTCOMES = Words(50)  # of calls: a provider of the operator's own may use any word
SOURCES = Words(100)  # an operator may add some

SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
LONG = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
DAY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800, 7_200, 86_400)
TICK = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# --- Both processes -------------------------------------------------------------------------

build = Info("baton_build", "The version that runs.", registry=COMMON)
build.info({"version": __version__})
ProcessCollector(registry=COMMON)

loop_lag = Histogram(
    "baton_event_loop_lag_seconds",
    "How much later than asked for the event loop came back, twice a second.",
    buckets=TICK,
    registry=COMMON,
)
pool_connections = Gauge(
    "baton_pool_connections",
    "Connections of a pool to PostgreSQL; state is used or idle.",
    ["pool", "state"],
    registry=COMMON,
)
pool_limit = Gauge(
    "baton_pool_connections_limit",
    "Connections that a pool may have.",
    ["pool"],
    registry=COMMON,
)
pool_exhausted = Counter(
    "baton_pool_exhausted_total",
    "Times that no connection to PostgreSQL could be had in time.",
    registry=COMMON,
)
sweeps = Counter(
    "baton_sweeps_total",
    "Looks of the sweeper; result is ok, braked (expiries waited out), unavailable or refused.",
    ["result"],
    registry=COMMON,
)
reconciled = Counter(
    "baton_reconciled_total",
    "Jobs without a ticket and tickets without a job that were mended; what is jobs or tickets.",
    ["what"],
    registry=COMMON,
)
woken = Counter(
    "baton_jobs_woken_total",
    "Parked jobs that were given a ticket because they were due.",
    registry=COMMON,
)
job_transitions = Counter(
    "baton_job_transitions_total",
    "Changes of jobs; transition is submit, claim, complete, fail, release, park, hold, crash, "
    "sweep or cancel.",
    ["kind", "transition"],
    registry=COMMON,
)
jobs_ended = Counter(
    "baton_jobs_ended_total",
    "Jobs that ended; error_code is none when they succeeded.",
    ["kind", "outcome", "error_code"],
    registry=COMMON,
)

# --- The API --------------------------------------------------------------------------------

requests = Counter(
    "baton_http_requests_total",
    "Requests that were answered; route is the path's template or other, status aborted when the "
    "client had gone before the answer.",
    ["method", "route", "status"],
    registry=API,
)
request_seconds = Histogram(
    "baton_http_request_duration_seconds",
    "Time to answer a request, without those that were held open (Prefer: wait, event streams).",
    ["method", "route"],
    buckets=SHORT,
    registry=API,
)
requests_open = Gauge(
    "baton_http_requests_in_progress", "Requests that are being answered.", registry=API
)
requests_held = Gauge(
    "baton_http_requests_held",
    "Requests of them that are held open until a job changes.",
    registry=API,
)
hook_deliveries = Counter(
    "baton_hook_deliveries_total",
    "Requests of integrations; result is accepted, duplicate, or why it was refused: unverified, "
    "malformed, too_large or full.",
    ["source", "result"],
    registry=API,
)
database_up = Gauge(
    "baton_database_up",
    "1 when the database answered the API and has a schema, 0 when not.",
    registry=API,
)

# What the API reads from the database when it is asked for its metrics. Each API process says the
# same: take the max over them, not the sum.
schema_version = Gauge(
    "baton_schema_version", "Version of the schema in the database.", registry=DATABASE
)
jobs = Gauge(
    "baton_jobs",
    "Jobs that have not ended; state is ready, parked, paused, held or running, as in "
    "ops.queue_depth.",
    ["kind", "state"],
    registry=DATABASE,
)
oldest_ready = Gauge(
    "baton_oldest_ready_seconds",
    "Since the oldest job that is ready for a worker was asked for; 0 when none is.",
    ["kind"],
    registry=DATABASE,
)
check_ok = Gauge(
    "baton_check_ok",
    "1 when a check of ops.health is ok, 0 when not; what to do is in ops.checks.",
    ["check"],
    registry=DATABASE,
)
leases_expired = Gauge(
    "baton_leases_expired", "Leases that have expired and are not swept yet.", registry=DATABASE
)
workers_alive = Gauge(
    "baton_workers_alive", "Workers whose heart has beaten lately.", registry=DATABASE
)
webhooks_waiting = Gauge(
    "baton_webhooks_waiting", "Webhooks that are not delivered yet.", registry=DATABASE
)
webhooks_overdue = Gauge(
    "baton_webhooks_overdue_seconds",
    "How long the most overdue webhook should have been tried; 0 when none is overdue.",
    registry=DATABASE,
)

# --- The worker -----------------------------------------------------------------------------

concurrency = Gauge(
    "baton_worker_concurrency", "Attempts that the worker runs at once.", registry=WORKER
)
attempts_running = Gauge(
    "baton_attempts_in_progress", "Attempts that the worker runs right now.", registry=WORKER
)
pickup_seconds = Histogram(
    "baton_job_pickup_seconds",
    "From the request for a job to its first attempt.",
    ["kind"],
    buckets=DAY,
    registry=WORKER,
)
attempt_seconds = Histogram(
    "baton_job_attempt_seconds",
    "An attempt, from its claim to its stored outcome; transition is how it ended, or fenced.",
    ["kind", "transition"],
    buckets=LONG,
    registry=WORKER,
)
job_seconds = Histogram(
    "baton_job_duration_seconds",
    "From the request for a job to its end in a worker.",
    ["kind", "outcome"],
    buckets=DAY,
    registry=WORKER,
)
provider_calls = Counter(
    "baton_provider_calls_total",
    "Calls of a model; outcome is ok, or a word for how it failed.",
    ["kind", "model", "outcome"],
    registry=WORKER,
)
provider_seconds = Histogram(
    "baton_provider_call_duration_seconds",
    "A call of a model, to the last byte of its answer.",
    ["model"],
    buckets=LONG,
    registry=WORKER,
)
provider_tokens = Counter(
    "baton_provider_tokens_total",
    "Tokens of calls of a model; type is prompt or completion.",
    ["kind", "model", "type"],
    registry=WORKER,
)
breaker_open = Gauge(
    "baton_breaker_open",
    "1 while the worker takes no tickets because its provider is down.",
    registry=WORKER,
)
breaker_opened = Counter(
    "baton_breaker_opened_total", "Times that the provider was found down.", registry=WORKER
)
renewals = Counter(
    "baton_lease_renewals_total",
    "Renewals of all leases of a worker; result is ok or unavailable.",
    ["result"],
    registry=WORKER,
)
renewal_age = Gauge(
    "baton_lease_renewal_age_seconds",
    "Time since the leases of the worker were last renewed; a lease counts for 15 s.",
    registry=WORKER,
)
leases_lost = Counter(
    "baton_leases_lost_total",
    "Attempts that were stopped or refused because their lease was lost; found is by renewal or "
    "write.",
    ["found"],
    registry=WORKER,
)
webhook_attempts = Counter(
    "baton_webhook_attempts_total",
    "Attempts to deliver a webhook; state is what it is afterwards, answer the class of the HTTP "
    "status or none.",
    ["state", "answer"],
    registry=WORKER,
)
webhook_seconds = Histogram(
    "baton_webhook_duration_seconds",
    "An attempt to deliver a webhook.",
    buckets=SHORT,
    registry=WORKER,
)
mapped = Counter(
    "baton_hook_deliveries_mapped_total",
    "Deliveries of integrations that became events; result is ok, generic when the mapping or the "
    "database would not have it otherwise, or failed.",
    ["source", "result"],
    registry=WORKER,
)
mapped_seconds = Histogram(
    "baton_hook_delivery_wait_seconds",
    "From the arrival of a delivery of an integration to its events.",
    buckets=DAY,
    registry=WORKER,
)
