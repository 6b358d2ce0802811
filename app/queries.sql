-- Every statement that Python asks, by name. What two statements have to agree on is a function
-- in schema.sql. Parameters are positional; the caller's user id comes first wherever a caller
-- is behind the statement, and $n are listed in the line under the name.

-- name: schema_version
-- The newest schema that has been applied; no row in a database that has none.
select max(version) from schema_version;

-- name: schema_digest
-- $1 version. Which text of schema.sql made it.
select digest from schema_version where version = $1;

-- name: record_schema
-- $1 version, $2 digest.
insert into schema_version (version, digest) values ($1, $2)
on conflict (version) do update set digest = excluded.digest, applied_at = now();

-- name: has_table
-- $1 name. Asked before anything else of a database that may be empty.
select to_regclass($1) is not null;

-- name: may_read
-- $1 name. Is there such a table, of a version that lets this role read it?
select coalesce(has_table_privilege(to_regclass($1), 'select'), false);

-- name: try_lock_migration
-- Those that migrate at once take turns; the lock ends with the session. Older programs wait for it.
select pg_try_advisory_lock(hashtextextended('baton migrate', 0));

-- name: lacking_membership
-- The login, and a role that who migrates has to be in: the owner of an older schema, or ours.
select quote_ident(current_user), quote_ident(rolname)
from pg_roles
where (rolname = 'baton_migrate'
    or oid = (select relowner from pg_class where oid = to_regclass('public.schema_version')))
  and not pg_has_role(oid, 'member')
order by rolname = 'baton_migrate'
limit 1;

-- name: procrastinate_record
-- Which of Procrastinate's migrations this database has, or waits for.
select name, version, applied_at from procrastinate_migrations;

-- name: record_procrastinate
-- $1 name, $2 Baton's version, $3 whether it has been applied.
insert into procrastinate_migrations (name, version, applied_at)
values ($1, $2, case when $3 then now() end)
on conflict (name) do update set applied_at = excluded.applied_at;

-- name: index_is_valid
-- $1 name. Null when there is no such index, false when its build was interrupted.
select indisvalid from pg_index where indexrelid = to_regclass($1);

-- name: tell_made
-- $1 names: what schema.sql makes in the schema public. Tells its section Roles, until the
-- transaction ends.
select set_config('baton.made', $1::text[]::text, true);

-- name: cancel_waiting
-- How many statements were cancelled that wait for a table which this transaction has changed.
select count(pg_cancel_backend(w.pid))
from pg_locks mine
join pg_locks w on w.relation = mine.relation and w.database = mine.database and not w.granted
join pg_stat_activity a on a.pid = w.pid
join pg_roles r on r.oid = a.usesysid
where mine.pid = pg_backend_pid() and mine.mode = 'AccessExclusiveLock' and mine.granted
  and ((select rolsuper from pg_roles where rolname = current_user)
       or not r.rolsuper and (pg_has_role(r.oid, 'USAGE') or pg_has_role('pg_signal_backend', 'USAGE')));

-- name: oldest_transaction
-- Who most likely holds the lock that a migration waits for.
select
  format('%s (pid %s)', coalesce(nullif(application_name, ''), usename), pid) as who,
  extract(epoch from clock_timestamp() - xact_start)::float8 as seconds
from pg_stat_activity
where datname = current_database() and xact_start is not null and pid <> pg_backend_pid()
order by xact_start
limit 1;

-- name: admit
-- $1 SHA-256 of the raw key, $2 policies, $3 their quotas. Who a live key acts for, and whether the
-- request may go on.
select user_id, key_id, quotas, remaining, resets, refused from admit($1, $2, $3);

-- name: revoked_keys
-- $1 keys. Those that are good no more.
select revoked_keys($1);

-- name: take_wait_slot
-- $1 user, $2 key, $3 quota, $4 seconds that it counts unless kept, $5 slots given up just now.
select slot, quota, remaining from take_wait_slot($1, $2, $3, $4, $5);

-- name: keep_wait_slots
-- $1 slots held, $2 slots given up, $3 seconds that the held ones count from now.
select keep_wait_slots($1, $2, $3);

-- name: submit_job
-- $1 user, $2 project, $3 kind, $4 sources, $5 filters, $6 until, $7 options, $8 of the job itself,
-- $9 idempotency key or null, $10 fingerprint, $11 pending jobs that the project may have. The job
-- as a client sees it. BT404, BT400, BT411, BT422, BT429.
select (s.job).*, s.replayed, s.deduplicated
from submit_job($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) s;

-- name: read_job
-- $1 user, $2 job. The job as a client sees it, if this user may.
select j.*
from job_objects j
join project_access a on a.project_id = j.project_id and a.user_id = $1
where j.id = $2;

-- name: is_deleted
-- $1 user, $2 job. Asked only for a job that is not there: has it been deleted?
select exists (
  select from deleted_jobs d
  join project_access a on a.project_id = d.project_id and a.user_id = $1
  where d.id = $2);

-- name: read_jobs
-- $1 user, $2 jobs. Those of them that this user may see.
select j.*
from job_objects j
join project_access a on a.project_id = j.project_id and a.user_id = $1
where j.id = any ($2);

-- name: list_jobs
-- $1 user, $2 project or null, $3 kind, $4 status, $5 error code, $6 created after, $7 created
-- before, $8 metadata, $9 idempotency key of this user, each or null, $10 and $11 created_at and id
-- of the last job of the page before or null, $12 limit. Newest first.
select j.*
from (
  select j.id
  from project_access a
  cross join lateral (
    select id, created_at
    from jobs
    where project_id = a.project_id
      and ($3::text is null or kind = $3)
      and ($4::text is null or status = $4)
      and ($5::text is null or error_code = $5)
      and ($6::timestamptz is null or created_at > $6)
      and ($7::timestamptz is null or created_at < $7)
      and ($8::jsonb is null or metadata <> '{}' and metadata @> $8)
      and ($9::text is null or id in (
        select job_id from idempotency_keys where user_id = $1 and key = $9))
      and ($10::timestamptz is null or (created_at, id) < ($10, $11::uuid))
    order by created_at desc, id desc
    limit $12
  ) j
  where a.user_id = $1 and ($2::uuid is null or a.project_id = $2)
  order by j.created_at desc, j.id desc
  limit $12
) page
join job_objects j on j.id = page.id
order by j.created_at desc, j.id desc;

-- name: pace
-- Per kind, how long the last 200 completed jobs waited and ran: medians in seconds.
select
  f.kind,
  percentile_cont(0.5) within group (
    order by extract(epoch from p.started_at - p.created_at))::float8 as wait,
  percentile_cont(0.5) within group (
    order by extract(epoch from p.completed_at - p.started_at))::float8 as run
from flows f
cross join lateral (
  select created_at, started_at, completed_at
  from jobs
  where kind = f.kind and status = 'completed'
  order by completed_at desc
  limit 200
) p
group by f.kind;

-- name: cancel_job
-- $1 user, $2 job. BT404, BT411.
select (c.job).*, c.changed, c.running_ticket_id from cancel_job($1, $2) c;

-- name: retry_job
-- $1 user, $2 job, $3 idempotency key or null, $4 fingerprint, $5 pending jobs that the project may
-- have, $6 of the request itself. BT404, BT409, BT411, BT422, BT429.
select (r.job).*, r.replayed from retry_job($1, $2, $3, $4, $5, $6) r;

-- name: delete_job
-- $1 user, $2 job. BT404, BT409, BT411.
select delete_job($1, $2);

-- name: read_handoff
-- $1 user, $2 handoffs.
select
  h.id, h.user_id, h.project_id, p.name as project_name,
  case when p.organization_id is null then 'personal' else 'project' end as scope_type,
  h.title, h.summary, h.status, h.sources, h.key_changes, h.decisions, h.open_questions,
  h.next_steps, h.data, h.related_event_ids, h.period_start, h.period_end, h.model_used,
  h.token_usage, h.created_at, h.updated_at, h.markdown
from handoffs h
join projects p on p.id = h.project_id
join project_access a on a.project_id = h.project_id and a.user_id = $1
where h.id = any ($2);

-- name: list_handoffs
-- $1 user, $2 project or null for all, $3 status or null for all, $4 limit. Newest first; each
-- project gives at most $4 rows, so the sort never sees more than that times the projects.
select
  h.id, h.user_id, h.project_id, p.name as project_name,
  case when p.organization_id is null then 'personal' else 'project' end as scope_type,
  h.title, h.summary, h.status, h.sources, h.key_changes, h.decisions, h.open_questions,
  h.next_steps, h.data, h.related_event_ids, h.period_start, h.period_end, h.model_used,
  h.token_usage, h.created_at, h.updated_at, h.markdown
from project_access a
join projects p on p.id = a.project_id
cross join lateral (
  select *
  from handoffs
  where project_id = a.project_id and ($3::text is null or status = $3)
  order by created_at desc, id desc
  limit $4
) h
where a.user_id = $1 and ($2::uuid is null or a.project_id = $2)
order by h.created_at desc, h.id desc
limit $4;

-- name: set_handoff_status
-- $1 user, $2 handoff, $3 status. The id, or no row when it is not visible.
update handoffs h
set status = $3, updated_at = baton_now()
from project_access a
where h.id = $2 and a.project_id = h.project_id and a.user_id = $1
returning h.id;

-- name: read_insight
-- $1 user, $2 insights.
select
  i.id, i.project_id, i.requested_by, i.kind, i.title, i.summary, i.data, i.model_used,
  i.token_usage, i.status, i.related_event_ids, i.period_start, i.period_end, i.created_at,
  i.updated_at, i.markdown
from insights i
join project_access a on a.project_id = i.project_id and a.user_id = $1
where i.id = any ($2);

-- name: list_insights
-- $1 user, $2 project, $3 kind or null, $4 status or null, $5 limit. Newest first. Answers to questions
-- and digests only when their kind is asked for.
select
  i.id, i.project_id, i.requested_by, i.kind, i.title, i.summary, i.data, i.model_used,
  i.token_usage, i.status, i.related_event_ids, i.period_start, i.period_end, i.created_at,
  i.updated_at, i.markdown
from insights i
join project_access a on a.project_id = i.project_id and a.user_id = $1
where i.project_id = $2
  and case when $3::text is null then i.kind not in ('question', 'digest') else i.kind = $3 end
  and ($4::text is null or i.status = $4)
order by i.created_at desc, i.id desc
limit $5;

-- name: set_insight_status
-- $1 user, $2 insight, $3 status. The id, or no row when it is not visible.
update insights i
set status = $3, updated_at = baton_now()
from project_access a
where i.id = $2 and a.project_id = i.project_id and a.user_id = $1
returning i.id;

-- name: assert_project
-- $1 user, $2 project. BT404 unless visible.
select assert_project($1, $2);

-- name: list_organizations
-- $1 user.
select
  o.id, o.name, o.slug,
  case when m.role = 'admin' or m.admin_until > baton_now() then 'admin' else 'member' end as role,
  m.role = 'member' and coalesce(m.admin_until > baton_now(), false) as is_temporary_admin
from members m
join organizations o on o.id = m.organization_id
where m.user_id = $1
order by o.name, o.id;

-- name: list_projects
-- $1 user.
select
  p.id, p.name, p.slug, p.description, p.organization_id, o.name as organization_name,
  o.slug as organization_slug,
  case when o.id is null then 'personal' else 'organization' end as project_type,
  a.access_role, p.created_at, p.updated_at
from project_access a
join projects p on p.id = a.project_id
left join organizations o on o.id = p.organization_id
where a.user_id = $1
order by p.name, p.id;

-- name: allow_time
-- $1 how long, such as 8s. For the next statements of this transaction.
select set_config('statement_timeout', $1, true);

-- name: ingest_events
-- $1 user, $2 project, $3 array of events. BT404, BT400.
select accepted, duplicates from ingest_events($1, $2, $3);

-- name: list_events
-- $1 user, $2 project or null, $3 source or null, $4 limit. Newest first, as list_handoffs.
select
  e.id, e.user_id, e.project_id, e.source, e.event_type, e.title, e.content, e.external_id,
  e.resource, e.branch, e.priority, e.author, e.url, e.metadata, e.occurred_at, e.created_at
from project_access a
cross join lateral (
  select *
  from events
  where project_id = a.project_id and ($3::text is null or source = $3)
  order by occurred_at desc, id desc
  limit $4
) e
where a.user_id = $1 and ($2::uuid is null or a.project_id = $2)
order by e.occurred_at desc, e.id desc
limit $4;

-- name: has_source
-- $1 name. Asked only when a list came back empty, to tell a typo from silence.
select exists (select from sources where name = $1);

-- name: list_facets
-- $1 user, $2 project or null. What the events of the visible projects really hold, and what a
-- filter may ask for: an event may name a branch though its source has none. Of a resource also what
-- people call it, and the branch it starts from, where an integration knows.
select f.source, f.dimension, f.resource, f.value, min(r.name) as name,
  min(r.default_branch) as default_branch
from project_access a
join event_facets f on f.project_id = a.project_id
join sources s on s.name = f.source
left join (
  resources r join integrations i on i.id = r.integration_id
) on f.dimension = 'projects' and r.project_id = f.project_id and r.id = f.value
  and i.source = f.source
where a.user_id = $1 and ($2::uuid is null or a.project_id = $2)
  and (f.dimension <> 'branches' or s.has_branches)
  and (f.dimension <> 'priorities' or s.has_priorities)
group by f.source, f.dimension, f.resource, f.value
order by f.source, f.dimension, f.resource, f.value;

-- name: claim_job
-- $1 job, $2 ticket, $3 worker, $4 lease in seconds. No row: the ticket is to be dropped.
select
  j.id, j.user_id, j.project_id, p.name as project_name, j.kind, j.input, j.attempt, j.crashes,
  j.provider_errors, j.lease_token, j.created_at, j.request_id, j.traceparent, u.plan, n.models,
  baton_now() as claimed_at
from claim_job($1, $2, $3, $4) j
join projects p on p.id = j.project_id
join users u on u.id = p.owner_id
join plans n on n.name = u.plan;

-- name: renew_leases
-- $1 jobs, $2 tokens, $3 lease in seconds. The jobs that are still this worker's.
select renew_leases($1, $2, $3);

-- name: report_progress
-- $1 jobs, $2 tokens, $3 what each is at. The jobs that are still this worker's.
select report_progress($1, $2, $3);

-- name: record_calls
-- $1 calls of models that attempts have made, as an array.
select record_calls($1);

-- name: complete_job
-- $1 job, $2 token, $3 artifact. BT410 when fenced.
select id, status from complete_job($1, $2, $3);

-- name: fail_job
-- $1 job, $2 token, $3 code, $4 sentence, $5 meta. BT410 when fenced.
select id, status from fail_job($1, $2, $3, $4, $5);

-- name: release_job
-- $1 job, $2 token. BT410 when fenced.
select id, status from release_job($1, $2);

-- name: park_job
-- $1 job, $2 token, $3 delay in seconds, $4 code, $5 sentence, $6 meta. The new status. BT410.
select park_job($1, $2, $3, $4, $5, $6);

-- name: hold_job
-- $1 job, $2 token, $3 delay in seconds. The new status. BT410.
select hold_job($1, $2, $3);

-- name: crash_job
-- $1 job, $2 token, $3 sentence, $4 meta. The new status. BT410.
select crash_job($1, $2, $3, $4);

-- name: create_webhook
-- $1 user, $2 project, $3 URL, $4 types. With its secret, this once. BT404, BT403, BT409.
select
  (c.webhook).id, (c.webhook).project_id, (c.webhook).url, (c.webhook).types, (c.webhook).enabled,
  (c.webhook).disabled_reason, (c.webhook).created_at, (c.webhook).updated_at, c.secret
from create_webhook($1, $2, $3, $4) c;

-- name: list_webhooks
-- $1 user, $2 project or null. Oldest first.
select
  e.id, e.project_id, e.url, e.types, e.enabled, e.disabled_reason, e.created_at, e.updated_at
from project_access a
join webhook_endpoints e on e.project_id = a.project_id
where a.user_id = $1 and ($2::uuid is null or a.project_id = $2)
order by e.id;

-- name: update_webhook
-- $1 user, $2 webhook, $3 enabled, $4 URL, $5 types, each or null. BT404, BT403, BT409.
select id, project_id, url, types, enabled, disabled_reason, created_at, updated_at
from update_webhook($1, $2, $3, $4, $5);

-- name: rotate_webhook
-- $1 user, $2 webhook. With its new secret, this once. BT404, BT403.
select
  e.id, e.project_id, e.url, e.types, e.enabled, e.disabled_reason, e.created_at, e.updated_at,
  r.secret
from rotate_webhook_secret($1, null, $2) as r (secret)
left join webhook_endpoints e on e.id = $2;

-- name: delete_webhook
-- $1 user, $2 webhook. BT404, BT403.
select delete_webhook($1, $2);

-- name: read_webhook_secret
-- $1 user, $2 project. What signs for job.webhook_url. BT404, BT403.
select read_webhook_secret($1, $2);

-- name: rotate_webhook_secret
-- $1 user, $2 project. BT404, BT403.
select rotate_webhook_secret($1, $2, null);

-- name: sees_deliveries
-- $1 user and one of $2 project, $3 job, $4 webhook. May the user see it?
select exists (
  select from project_access a
  where a.user_id = $1 and a.project_id = coalesce(
    $2::uuid,
    (select j.project_id from jobs j where j.id = $3),
    (select e.project_id from webhook_endpoints e where e.id = $4)));

-- name: list_deliveries
-- $1 user, one of $2 project, $3 job, $4 webhook, and $5 limit. Newest first, each with its log.
select
  d.id, d.job_id, d.project_id, d.endpoint_id as webhook_id, d.url, d.type, d.state, d.attempt,
  d.next_attempt_at, d.created_at, d.ended_at, attempts_of(d.id) as attempts
from (
  (select * from webhook_deliveries where project_id = $2 order by id desc limit $5)
  union all
  (select * from webhook_deliveries where job_id = $3 order by id desc limit $5)
  union all
  (select * from webhook_deliveries where endpoint_id = $4 order by id desc limit $5)
) d
join project_access a on a.project_id = d.project_id and a.user_id = $1
order by d.id desc;

-- name: replay_delivery
-- $1 user, $2 delivery. BT404, BT403, BT409.
select
  id, job_id, project_id, endpoint_id as webhook_id, url, type, state, attempt, next_attempt_at,
  created_at, ended_at, attempts_of(id) as attempts
from replay_webhook($1, $2);

-- name: claim_webhooks
-- $1 limit, $2 at most of one host, $3 hosts and $4 what is free of them, $5 lease in seconds.
select
  id, job_id, project_id, url, host, type, payload, attempt, leased_until, created_at, secrets
from claim_webhooks($1, $2, $3, $4, $5);

-- name: webhook_attempted
-- $1 delivery, $2 lease, $3 when, $4 status or null, $5 milliseconds, $6 error or null, $7 seconds
-- until the next attempt or null, $8 gone. The new state.
select webhook_attempted($1, $2, $3, $4, $5, $6, $7, $8);

-- name: release_webhook
-- $1 delivery, $2 lease. Due again now.
select release_webhook($1, $2);

-- name: list_digests
-- $1 user, $2 project, $3 limit. Newest first.
select
  i.id, i.project_id as "projectId", i.requested_by as "generatedBy",
  i.period_start as "periodStart", i.period_end as "periodEnd",
  jsonb_build_object('title', i.title) || i.data as content, i.markdown,
  i.created_at as "createdAt"
from insights i
join project_access a on a.project_id = i.project_id and a.user_id = $1
where i.project_id = $2 and i.kind = 'digest' and i.status = 'active'
order by i.created_at desc, i.id desc
limit $3;

-- name: read_digest_schedule
-- $1 user, $2 project. No row: it has none, or is not visible.
select
  d.project_id, d.cron, d.time_zone, d.covered_until as period_start, d.next_at, d.job_id as last_job_id,
  d.error,
  coalesce((
    select jsonb_agg(
      jsonb_build_object('to', i.source, 'channel_id', c.channel_id) order by i.source, c.channel_id)
    from digest_channels c
    join integrations i on i.id = c.integration_id
    where c.project_id = d.project_id), '[]') as deliver,
  d.updated_at
from digest_schedules d
join project_access a on a.project_id = d.project_id and a.user_id = $1
where d.project_id = $2;

-- name: set_digest_schedule
-- $1 user, $2 project, $3 cron expression, $4 time zone, $5 list of {"integration_id", "channel_id"}.
select from set_digest_schedule($1, $2, $3, $4, $5);

-- name: delete_digest_schedule
-- $1 user, $2 project.
select delete_digest_schedule($1, $2);

-- name: claim_chat_messages
-- $1 limit, $2 seconds of the lease.
select * from claim_chat_messages($1, $2);

-- name: chat_attempted
-- $1 message, $2 its lease, $3 the service's id of what was posted, $4 error or null, $5 seconds until
-- the next attempt or null. The state; null: another attempt decides.
select chat_attempted($1, $2, $3, $4, $5);

-- name: release_chat_message
-- $1 message, $2 its lease.
select release_chat_message($1, $2);

-- name: submit_digest
-- The project whose digest was asked for; null: none is due.
select submit_digest();

-- name: create_integration
-- $1 user, $2 organization or null, $3 source, $4 workspace id, $5 its name, $6 project of new resources,
-- $7 secret and $8 token, both encrypted, each or null. Its id. BT404, BT403, BT400, BT409.
select create_integration($1, $2, $3, $4, $5, $6, $7, $8);

-- name: read_integration
-- $1 user, $2 integration. No row: not visible.
select
  o.id, o.source, o.workspace_id, o.workspace_name, o.connected_at, o.scope, o.resource_type,
  o.connection_status, o.providers_connected, o.last_validated_at, o.organization_id, o.project_id,
  o.enabled, o.has_token, o.updated_at
from integration_access a
join integration_objects o on o.id = a.integration_id
where a.user_id = $1 and a.integration_id = $2;

-- name: list_integrations
-- $1 user, $2 project or null: those whose resources it has or will have. Oldest first.
select
  o.id, o.source, o.workspace_id, o.workspace_name, o.connected_at, o.scope, o.resource_type,
  o.connection_status, o.providers_connected, o.last_validated_at, o.organization_id, o.project_id,
  o.enabled, o.has_token, o.updated_at
from integration_access a
join integration_objects o on o.id = a.integration_id
where a.user_id = $1 and ($2::uuid is null or o.project_id = $2 or exists (
  select from resources r where r.integration_id = o.id and r.project_id = $2))
order by o.id;

-- name: update_integration
-- $1 user, $2 integration, $3 changes, $4 token, encrypted, or null. BT404, BT403, BT400.
select update_integration($1, $2, $3, $4);

-- name: rotate_integration
-- $1 user, $2 integration, $3 secret, encrypted; null: it has none then. BT404, BT403.
select rotate_integration($1, $2, $3);

-- name: delete_integration
-- $1 user, $2 integration, $3 rows at most. Whether it is gone. BT404, BT403.
select delete_integration($1, $2, $3);

-- name: list_untracked
-- $1 user. Resources without a project that something came of lately, newest first.
select
  i.source, r.id as resource_id, r.name as resource_name, r.type as resource_type,
  i.id as integration_id, r.last_event_at
from integration_access a
join integrations i on i.id = a.integration_id
join resources r on r.integration_id = i.id
where a.user_id = $1 and r.project_id is null
  and r.last_event_at > baton_now() - interval '14 days'
order by r.last_event_at desc, i.id, r.id
limit 1000;

-- name: list_resources
-- $1 project, which the caller may see.
select
  i.source, r.integration_id, r.id as resource_id, r.name as resource_name,
  r.type as resource_type, r.default_branch, r.last_event_at
from resources r
join integrations i on i.id = r.integration_id
where r.project_id = $1
order by i.source, r.name, r.id, r.integration_id;

-- name: set_resources
-- $1 user, $2 project, $3 integrations, $4 resources of them, $5 their sources or nulls. BT404, BT403,
-- BT400.
select set_resources($1, $2, $3, $4, $5);

-- name: pull_events
-- $1 project, or null for all, $2 limit. How many events that waited were taken; null: none wait.
select pull_events($1, $2);

-- name: read_scope
-- $1 project, which the caller may see.
select scope from projects where id = $1;

-- name: set_scope
-- $1 user, $2 project, $3 sources, $4 filters, each or null. The scope. BT404, BT403, BT400.
select set_project_scope($1, $2, $3, $4);

-- name: lease_counts
-- The database's clock, how many leases there are and how many have expired.
select
  extract(epoch from baton_now())::float8 as clock, count(*) as held,
  count(*) filter (where expires_at < baton_now()) as expired
from leases;

-- name: hold_reason
-- Why nothing may be done of its own accord: this is a restored copy. Null: it may.
select hold_reason();

-- name: sweepable
-- $1 limit. Jobs to sweep.
select sweepable($1);

-- name: sweep_job
-- $1 job. The new status, or null.
select sweep_job($1);

-- name: swept_job
-- $1 job. What to tell of a job that was swept.
select kind, attempt, outcome, error_code from jobs where id = $1;

-- name: wake_due
-- $1 limit. How many were brought back.
select wake_due($1);

-- name: wake_held
-- $1 limit. How many jobs were let go or held back.
select wake_held($1);

-- name: reconcile_jobs
-- $1 limit. How many were mended.
select reconcile_jobs($1);

-- name: apply_retention
-- $1 rows at most. Seconds until it is worth asking again.
select apply_retention($1);

-- name: count_usage
-- $1 limit. How many charges and calls were added to what is known of each day.
select count_usage($1);

-- name: reconcile_tickets
-- $1 seconds after which a silent worker is dead. How many were returned or dropped.
select reconcile_tickets($1);

-- name: unknown_tickets
-- $1 Procrastinate's worker, $2 the tickets that it knows of.
select unknown_tickets($1, $2);

-- name: beat
-- $1 Procrastinate's worker, $2 who it is, $3 seconds for which its provider is left alone, or null.
-- Its state; null: somebody took us for dead.
select beat($1, $2, $3);

-- name: stop_worker
-- $1 Procrastinate's worker. It has ended in order.
select stop_worker($1);

-- name: notify
-- $1 channels, $2 payloads. A statement of its own, after the commits that it announces; not worth
-- waiting for the disk, the more so as it holds a lock of the whole cluster meanwhile.
select set_config('synchronous_commit', 'off', true), count(pg_notify(channel, payload))
from unnest($1::text[], $2::text[]) as news (channel, payload);

-- name: changed_jobs
-- $1 jobs, $2 the rev that is known of each, 0 for none. Those that have another one; a null rev:
-- the job is not there any more.
select w.id, j.rev, coalesce(j.status in ('completed', 'failed'), true) as ended
from unnest($1::uuid[], $2::bigint[]) as w (id, rev)
left join jobs j on j.id = w.id
where j.rev is distinct from w.rev;

-- name: read_job_events
-- $1 user, $2 job, $3 after which seq, $4 limit. No row: the job is not visible. One row without a
-- seq: nothing came after that.
select j.rev, j.status in ('completed', 'failed') as ended, e.seq, e.type, e.at, e.data
from jobs j
join project_access a on a.project_id = j.project_id and a.user_id = $1
left join lateral (
  select seq, type, at, data
  from job_events
  where job_id = j.id and seq > $3
  order by seq
  limit $4
) e on true
where j.id = $2
order by e.seq;

-- name: end_ticket
-- $1 ticket, $2 Procrastinate's worker. A ticket ends with its job; this is for one whose job
-- another attempt has or had. No row is touched when the ticket has ended or moved on.
delete from procrastinate_jobs where id = $1 and status = 'doing' and worker_id = $2;

-- name: return_ticket
-- $1 ticket, $2 Procrastinate's worker, $3 seconds. The attempt broke before it could say how the
-- job goes on: try the ticket again a little later.
update procrastinate_jobs
set status = 'todo', worker_id = null, scheduled_at = now() + $3 * interval '1 second'
where id = $1 and status = 'doing' and worker_id = $2;

-- name: previous_handoff_end
-- $1 project, $2 scope, $3 before. Where the last active handoff of the same scope stopped.
select max(period_end)
from (
  select period_end, scope
  from handoffs
  where project_id = $1 and status = 'active'
  order by created_at desc, id desc
  limit 200
) recent
where scope = $2 and period_end < $3;

-- name: release_bounds
-- $1 project, $2 source, $3 repository or null, $4 until. The last two releases, newest first, and
-- whether the source has several repositories. A tag and what was published under it are one.
select max(occurred_at) as occurred_at, resource, (
    select count(*) > 1 from event_facets
    where project_id = $1 and source = $2 and dimension = 'projects'
  ) as several
from (
  select occurred_at, resource, coalesce(metadata ->> 'tag', id::text) as name
  from events
  where project_id = $1 and source = $2 and event_type in ('tag', 'release', 'release.published')
    and ($3::text is null or resource = $3) and occurred_at <= $4
  order by occurred_at desc, id desc
  limit 20
) recent
group by resource, name
order by max(occurred_at) desc
limit 2;

-- name: newest_event
-- $1 project, $2 sources or null, $3 until. When something last happened in scope.
select max(e.occurred_at)
from (
  select distinct source from event_facets
  where project_id = $1 and ($2::text[] is null or source = any ($2))
) s
cross join lateral (
  select occurred_at from events
  where project_id = $1 and source = s.source and occurred_at <= $3
  order by occurred_at desc, id desc
  limit 1
) e;

-- name: events_in_scope
-- $1 project, $2 sources or null, $3 filters, $4 since (exclusive), $5 until, $6 repository or
-- null, $7 limit. Newest first. A filter of a source narrows that source and no other. Source by
-- source, so that a rare one among many events is found by its index, and its newest 30 are there
-- whatever the others do. Channels, boards and people have the names that are known of them, while
-- a repository keeps its id, by which others refer to it. Contents are cut to two million characters together, 2,000 each at least;
-- metadata of more than 16 kB compressed, which nobody means, stays out.
select
  id, source, event_type, title,
  left(content, least(20000, greatest(2000, 2000000 / count(*) over ()))::int) as content,
  external_id, coalesce(called.name, resource) as resource, branch, priority,
  coalesce(known.name, author) as author, url,
  case when pg_column_size(metadata) <= 16384 then metadata else '{}' end as metadata, occurred_at
from (
  select e.*
  from (
    select distinct source, coalesce($3::jsonb -> source, '{}') as filter
    from event_facets
    where project_id = $1 and dimension = 'eventTypes'
      and ($2::text[] is null or source = any ($2))
  ) s
  cross join lateral (
    select *, row_number() over (order by occurred_at desc, id desc) as nth
    from events
    where project_id = $1 and source = s.source and occurred_at > $4 and occurred_at <= $5
      and ($6::text is null or resource = $6)
      and (not s.filter ? 'projects' or s.filter -> 'projects' ? resource)
      and (not s.filter ? 'eventTypes' or s.filter -> 'eventTypes' ? event_type)
      and (not s.filter ? 'branches' or s.filter -> 'branches' ? branch)
      and (not s.filter ? 'priorities' or s.filter -> 'priorities' ? priority)
    order by occurred_at desc, id desc
    limit $7
  ) e
  order by e.nth > 30, e.occurred_at desc, e.id desc
  limit $7
) e
left join names_in($1) called on called.type = 'resource' and called.known_as = resource
left join names_in($1) known on known.type = 'person' and known.known_as = author
order by occurred_at desc, id desc;

-- name: enter_events
-- $1 project or null for any, $2 limit. How many events a question can find now.
select enter_events($1, $2);

-- name: events_about
-- $1 project, $2 question, $3 sources or null, $4 filters, $5 since (exclusive), $6 until, $7 limit. What
-- speaks about the question, best first, cut as in events_in_scope.
select
  e.id, source, event_type, title, left(content, 20000) as content, external_id,
  coalesce(called.name, resource) as resource, branch, priority,
  coalesce(known.name, author) as author, url,
  case when pg_column_size(metadata) <= 16384 then metadata else '{}' end as metadata, occurred_at,
  s.score
from search_events($1, $2, $3, $4, $5, $6, $7) s
join events e on e.id = s.id
left join names_in($1) called on called.type = 'resource' and called.known_as = resource
left join names_in($1) known on known.type = 'person' and known.known_as = author
order by s.score desc, e.occurred_at desc, e.id desc;

-- name: has_key
-- Has a person ever got a key here? Those that `baton demo` makes for itself do not count.
select exists (select from api_keys where label <> 'baton handoff');

-- name: server_version
-- For `baton doctor`.
select current_setting('server_version');

-- name: find_user
-- $1 e-mail address. For the operator's commands.
select id from users where lower(email) = lower($1);

-- name: sole_user
-- The user of an install that has just one; no row otherwise.
select min(id::text)::uuid from users having count(*) = 1;

-- name: sole_member
-- $1 organization. The one who is meant when nobody is named: its only member, else its only admin;
-- no row otherwise.
select (array_agg(user_id order by role))[1]
from members
where organization_id = $1
having count(*) = 1 or count(*) filter (where role = 'admin') = 1;

-- name: find_organization
-- $1 slug.
select id from organizations where slug = $1;

-- name: find_projects
-- $1 id, slug or name. For the operator's commands: everything that may be meant.
select id, name, slug, owner_id, organization_id from projects
where id::text = $1 or slug = $1 or name = $1
order by created_at;

-- name: all_projects
-- For `baton project list`.
select p.id, p.name, p.slug, u.email as owner, o.slug as organization
from projects p
join users u on u.id = p.owner_id
left join organizations o on o.id = p.organization_id
order by p.created_at;

-- name: import_cursor
-- $1 project, $2 source, $3 resource, $4 stream.
select since, cursor, etag from import_cursors
where project_id = $1 and source = $2 and resource = $3 and stream = $4;

-- name: save_import_cursor
-- $1 project, $2 source, $3 resource, $4 stream, $5 since, $6 cursor, $7 etag.
select save_import_cursor($1, $2, $3, $4, $5, $6, $7);

-- name: all_integrations
-- For `baton integration list`.
select
  o.id, o.source, o.connection_status as status, coalesce(g.slug, u.email) as belongs_to,
  p.name as project, o.workspace_name as name
from integration_objects o
join integrations i on i.id = o.id
join users u on u.id = i.user_id
left join organizations g on g.id = i.organization_id
left join projects p on p.id = i.project_id
order by o.id;

-- name: find_integration
-- $1 id. For the operator's commands.
select id, source from integrations where id = $1;

-- name: add_integration
-- $1 source, $2 user, $3 organization or null, $4 project, $5 name, $6 secret and $7 token, both
-- encrypted, each or null. Its id.
select ops.create_integration($1, $2, $3, $4, $5, $6, $7);

-- name: brought_secrets
-- $1 integration. Those that are good, encrypted, the newest first.
select live_secrets($1, 'signing');

-- name: replace_integration_secret
-- $1 integration, $2 secret, encrypted, or null, $3 whether the old one ends at once.
select ops.rotate_integration($1, $2, case when $3 then interval '0' else interval '24 hours' end);

-- name: enable_integration
-- $1 integration, $2 enabled.
select ops.enable_integration($1, $2);

-- name: remove_integration
-- $1 integration, $2 rows at most. Whether it is gone.
select ops.delete_integration($1, $2);

-- name: stored_secrets
-- $1 after which, $2 limit. Encrypted.
select id, value from stored_secrets($1, $2);

-- name: rekey_secrets
-- $1 secrets, $2 what they were, $3 what they are now, both encrypted. How many have changed.
select rekey_secrets($1, $2, $3);

-- name: all_keys
-- For `baton key list`.
select k.prefix, u.email, k.label, k.created_at, k.revoked_at
from api_keys k
join users u on u.id = k.user_id
order by k.created_at;

-- name: create_user
-- $1 e-mail address.
select ops.create_user($1);

-- name: create_project
-- $1 name, $2 owner, $3 organization or null.
select ops.create_project($1, $2, $3);

-- name: create_api_key
-- $1 user, $2 label. The raw key, this once.
select ops.create_api_key($1, $2);

-- name: revoke_api_key
-- $1 prefix.
select ops.revoke_api_key($1);

-- name: jobs_by_kind
-- For GET /metrics. What is not done yet, by kind; seconds since the oldest that is ready was asked for.
select
  f.kind, coalesce(sum(q.ready), 0)::bigint as ready, coalesce(sum(q.parked), 0)::bigint as parked,
  coalesce(sum(q.paused), 0)::bigint as paused, coalesce(sum(q.held), 0)::bigint as held,
  coalesce(sum(q.running), 0)::bigint as running,
  coalesce(extract(epoch from max(q.oldest_ready)), 0)::float8 as oldest_ready
from flows f
left join ops.queue_depth q on q.kind = f.kind
group by f.kind;

-- name: checks
-- For GET /metrics.
select name, ok from check_states();

-- name: queue_state
-- $1 seconds after which a silent worker is dead. For GET /metrics: what should be few, and workers.
select
  (select count(*) from leases where expires_at < baton_now()) as leases_expired,
  (select count(*) from procrastinate_workers
   where last_heartbeat >= now() - $1 * interval '1 second') as workers_alive,
  w.waiting as webhooks_waiting, w.overdue as webhooks_overdue
from (
  select
    count(*) as waiting,
    coalesce(greatest(extract(epoch from baton_now() - min(next_attempt_at)), 0), 0)::float8 as overdue
  from webhook_deliveries
  where next_attempt_at is not null
) w;

-- name: workers_alive
-- $1 seconds without a sign after which a worker is dead. How many are not, and how many seconds ago
-- the liveliest one gave a sign; null when none is registered.
select
  count(*) filter (where last_heartbeat > now() - $1::float8 * interval '1 second') as alive,
  extract(epoch from now() - max(last_heartbeat))::float8 as seen
from procrastinate_workers;

-- name: failing_checks
-- What ops.health is not content with.
select name, value, threshold, unit, detail, meaning, advice from ops.checks where not ok;

-- name: hook_integrations
-- $1 ids, $2 how many of each that wait are counted. Of those that are there and enabled.
select id, source, secrets, waiting, waiting_bytes from hook_integrations($1, $2);

-- name: store_hook_deliveries
-- $1 integration ids, $2 delivery ids, $3 headers, $4 bodies. A word for each.
select store_hook_deliveries($1, $2, $3, $4);

-- name: keep_first_secret
-- $1 integration id, $2 encrypted secret. False: it has one.
select keep_first_secret($1, $2);

-- name: count_hooks
-- $1 integration ids, $2 results, $3 counts.
select count_hooks($1, $2, $3);

-- name: waiting_integrations
-- $1 the id after which to begin, $2 limit.
select id from waiting_integrations($1, $2) as id;

-- name: take_nameless
-- $1 how many.
select integration_id::text, type, id, token from take_nameless($1);

-- name: name_it
-- $1 integration, $2 channel or person, $3 id, $4 name or null, $5 seconds until asked again or null.
select name_it($1, $2, $3, $4, $5);

-- name: take_deliveries
-- $1 integration id, $2 limit, $3 bytes. They wait until end_deliveries in the same transaction.
select seq, delivery_id, source, headers, body, received_at from take_deliveries($1, $2, $3);

-- name: end_deliveries
-- $1 integration id, $2 seqs, $3 events, $4 why they become none. Null, or a SQLSTATE: not done.
select end_deliveries($1, $2, $3, $4);

-- name: chat_accounts
-- $1 user, $2 source. By what the user may post there; the token is encrypted.
select integration_id, workspace_id, token from chat_accounts($1, $2);
