-- Baton's schema.                                                                   version: 4
--
-- Baton writes handoffs and insights about a team's work. This file is the part of it that
-- PostgreSQL does; app/queries.sql is what Python asks. It is re-runnable: `baton migrate` applies
-- it over any earlier state of itself, in one transaction, after Procrastinate's own schema, and
-- notes in schema_version that it did. The programs of the version before go on working with it,
-- and no statement holds a lock for as long as a table is big: docs/upgrading.md has the rules.
--
--   plans            what the users of a plan may ask for, and how much of it in a month
--   users, organizations, members, projects   who may see what; a project is personal or of an
--                                             organization, project_access answers for both
--   api_keys         SHA-256 digests of the keys that act for a user; the raw key is never stored
--   limits           what one user may do instead of BATON_LIMITS
--   rate_windows     which requests of the last minute were admitted; unlogged
--   wait_slots       the requests that are held open right now; unlogged
--   sources          the vocabulary of where events come from; an operator can add a row
--   flows            the job kinds and what one costs, in credits
--   events           what happened: one row per piece of activity, stored once per external id
--   event_facets     the distinct values that events hold, so that filters need no scan of events
--   integrations, integration_secrets   what sends activity by itself, and what it proves that with
--   resources        the repositories, channels and boards of an integration: which project each is of;
--                    integration_access answers who may see and change an integration,
--                    integration_objects what a client sees of it
--   people           what a source calls people of whom it sends ids
--   hook_deliveries  what an integration has sent, once each
--   waiting_deliveries   those of them that are not mapped yet, as they came
--   hook_counts      how much was sent and refused lately, by integration
--   untracked_events events of resources that no project has yet
--   import_cursors   how far the history of a resource has been imported, by what it is read from
--   jobs             the truth about a request for an artifact; one row from 202 to the end
--   job_events       the log of a job: one row per change that a client can see, seq is jobs.rev
--   leases           one row per running attempt: who runs it and until when that counts
--   workers          one row per worker process: where it is, when it was last heard of
--   job_due          jobs that wait for a retry: no ticket exists for them until they are due; and
--                    jobs in line, which an operator holds back
--   pauses, project_concurrency   what holds them back: a kind is paused, a project has as many
--                    running attempts as it may
--   idempotency_keys what a client called a request: asked again, it gets the same job
--   deleted_jobs     which jobs a client deleted, or retention: they are gone, not unknown
--   retention        how long what is over is kept, by table, and how far its removal has come
--   handoffs, insights   the artifacts, one per completed job
--   search_entries   the words of what a question can reach: recent events, statements of artifacts
--   charges          what a completed job cost, one row per job
--   credit_grants    credits beside those of the plan
--   provider_calls   every call of a model that a worker made, whatever came of it
--   model_prices     what such a call costs, as far as an operator has told
--   usage_by_day, usage_counted   what charges and calls come to, and up to when they are in it
--   webhook_endpoints, webhook_secrets   who is told of the jobs of a project, and what signs it
--   webhook_deliveries, webhook_attempts   the messages, queued by the transaction that changed the
--                    job, and the log of sending them
--   digest_schedules, digest_channels   when the digests of a project are written, up to when they
--                    have been, and which channels they are posted into
--   chat_messages    what is posted, queued by the transaction that stored the digest
--   schema_version, procrastinate_migrations   what has been applied
--   installation     which database this is, so that a restored copy can tell that it is one
--   ops.audit        what operators did, by whom and when
--   ops.thresholds   from which value on a check of ops.health is not ok
--
-- and views: job_objects, the one place that says what a client sees of a job; balances, the one
-- place that says what is left of whose credits; usage_lately, what was used in the last months;
-- waiting_longest, lost_jobs and lost_tickets, what ops.checks counts and ops.stuck lists.
--
-- The life of a job, in verbs. Only the functions below write jobs.status:
--
--   submit_job    -> pending       the request is valid and the caller may make it; its ticket (a
--                                  row of procrastinate_jobs that only names the job) is deferred
--                                  with it
--                 -> failed        the plan or its credits do not allow it
--   claim_job     pending -> processing    a worker that holds a ticket takes the job: a new
--                                  attempt, a new random lease token, a row in leases
--   renew_leases  processing       the worker is alive; tells it which leases are still its own
--   complete_job  processing -> completed  artifact, charge, status and the end of the ticket
--   fail_job      processing -> failed     one sentence and a code; nothing is charged
--   release_job   processing -> pending    given back, for example at a restart; nothing counts
--   park_job      processing -> pending    a provider error that may pass: due again later; the
--                                  fifth is final
--   hold_job      processing -> pending    the provider is down: due again later; nothing counts
--   crash_job     processing -> pending    the attempt's own process died; the third is final
--   sweep_job     processing -> pending    the lease has expired, so the worker is taken for dead;
--                 any -> failed            the job is past its deadline
--   cancel_job    any -> failed            the caller wants it no more; the running attempt is fenced
--                                          off at once and told to stop
--
-- A job that is held back stays pending. It has no ticket but a row in job_due, in a line, until
-- wake_held or the end of another attempt gives it one; only claim_job decides, so a ticket that
-- should not be there does no harm.
--
-- retry_job makes a new job of a failed one, and delete_job takes an ended one away with its artifact.
--
-- Nothing of this needs a worker that behaves: every process, API or worker, sweeps each few
-- seconds, brings back what is due, and reconciles jobs with tickets (reconcile_jobs,
-- reconcile_tickets). Losing, repeating or duplicating a ticket is harmless.
--
-- The lease token is the fence: every write of a running attempt carries it, and one that is not
-- the current token of the job is refused (BT410). A completed or failed job never changes its
-- status again (BT409). Lock order, everywhere: job, lease, ticket, artifact, charge.
--
-- SQLSTATE  BT400 a request is wrong; the message is a sentence that names the field
--           BT403 visible, but the caller's role does not allow this
--           BT404 not there, or not visible to the caller; the two look alike
--           BT409 the job is not in a status that allows this
--           BT410 the lease is lost: another attempt owns the job, or it has ended
--           BT411 it was there and has been deleted
--           BT422 the idempotency key was used for another request
--           BT429 the project has as many pending jobs as it may
--
-- Statuses are text with a CHECK, not enums, so that this file stays re-runnable.

-- --- Clock and ids ------------------------------------------------------------------------

-- The only clock of this schema. A test moves it with `set baton.clock_offset = '1 hour'`; for logins
-- other than a superuser that does nothing, or they could make old what must not be removed.
create or replace function clock_offset() returns interval
language plpgsql stable as $$
begin
  return case when (select rolsuper from pg_roles where rolname = session_user)
    then current_setting('baton.clock_offset')::interval else '0' end;
end
$$;
create or replace function baton_now() returns timestamptz
language sql stable as $$
  select case coalesce(current_setting('baton.clock_offset', true), '')
    when '' then now() else now() + public.clock_offset() end
$$;

-- Not below 0, which is where a clock that was set back would lead.
create or replace function milliseconds(p_from timestamptz, p_to timestamptz) returns bigint
language sql immutable as $$
  select case when p_to < p_from then 0 else (extract(epoch from p_to - p_from) * 1000)::bigint end
$$;

-- PostgreSQL 18 has uuidv7(); 15 to 17 get one of that name (RFC 9562: 48 bits of milliseconds,
-- then random bits, so that ids made later sort later and indexes stay dense).
do $$
begin
  if to_regproc('pg_catalog.uuidv7') is null then
    create or replace function uuidv7() returns uuid
    language sql volatile as $uuid$
      select encode(
        set_bit(
          set_bit(
            overlay(
              uuid_send(gen_random_uuid())
              placing substring(
                int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
              from 1 for 6),
            52, 1),
          53, 1),
        'hex')::uuid
    $uuid$;
  end if;
end
$$;

create table if not exists schema_version (
  version int primary key,
  digest text not null,  -- SHA-256 of this file: what is already there is not applied again
  applied_at timestamptz not null default now()
);

-- An older program would put its functions in the place of these. Programs of version 2 do not look
-- at the version, but note their own at the end of their one transaction.
create or replace function refuse_older_schema() returns trigger
language plpgsql as $$
begin
  if new.version < (select max(version) from schema_version) then
    raise 'The database is at version % of the schema, newer than this program''s version %: use the newer program.',
      (select max(version) from schema_version), new.version;
  end if;
  return new;
end
$$;
create or replace trigger schema_version_grows before insert on schema_version for each row
  execute function refuse_older_schema();

-- What app/migration.py knows of Procrastinate's own migrations.
create table if not exists procrastinate_migrations (
  name text primary key,  -- of the file
  version int not null,  -- of the Baton that brought it
  applied_at timestamptz  -- null: it takes away what an older worker uses, and waits for the next Baton
);

-- --- People and what they may see ---------------------------------------------------------

create table if not exists plans (
  name text primary key,
  monthly_credits int check (monthly_credits >= 0),  -- null: no limit
  overage boolean not null default false,  -- go on, and charge, when they are used up
  flows text[],  -- job kinds; null: all
  models text[]  -- as a provider is asked for them, such as BATON_MODEL; null: all
);
insert into plans (name) values ('self_hosted') on conflict do nothing;

create table if not exists users (
  id uuid primary key default uuidv7(),
  email text not null check (email ~ '^[^@[:space:]]+@[^@[:space:]]+$' and length(email) <= 320),
  name text not null check (length(name) between 1 and 300),
  plan text not null default 'self_hosted',
  created_at timestamptz not null default baton_now()
);
create unique index if not exists users_email on users (lower(email));

-- Until version 2 a plan was any text, and meant everything.
do $$
begin
  if not exists (
    select from pg_constraint where conrelid = 'users'::regclass and conname = 'users_plan_fkey') then
    insert into plans (name) select distinct plan from users on conflict do nothing;
    alter table users add constraint users_plan_fkey foreign key (plan) references plans
      on update cascade;
  end if;
end
$$;

create table if not exists organizations (
  id uuid primary key default uuidv7(),
  name text not null check (length(name) between 1 and 300),
  slug text not null unique check (slug ~ '^[a-z0-9]+(-[a-z0-9]+)*$'),
  created_at timestamptz not null default baton_now()
);

create table if not exists members (
  organization_id uuid not null references organizations on delete cascade,
  user_id uuid not null references users on delete cascade,
  role text not null check (role in ('admin', 'member')),
  admin_until timestamptz,  -- a member who is an admin until then
  created_at timestamptz not null default baton_now(),
  primary key (organization_id, user_id)
);
create index if not exists members_user on members (user_id);

create table if not exists projects (
  id uuid primary key default uuidv7(),
  name text not null check (length(name) between 1 and 300),
  slug text not null check (slug ~ '^[a-z0-9]+(-[a-z0-9]+)*$'),
  description text,
  owner_id uuid not null references users,
  organization_id uuid references organizations,  -- null: personal
  scope jsonb,  -- {"sources": […], "filters": {…}}, used when a request names neither
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now()
);
create unique index if not exists projects_personal_slug on projects (owner_id, slug)
  where organization_id is null;
create unique index if not exists projects_organization_slug on projects (organization_id, slug)
  where organization_id is not null;
create index if not exists projects_owner on projects (owner_id);
do $$
begin
  if not exists (
    select from pg_constraint
    where conrelid = 'projects'::regclass and conname = 'projects_scope_check') then
    alter table projects add constraint projects_scope_check check (
      jsonb_typeof(scope) = 'object'
      and coalesce(jsonb_typeof(scope -> 'sources') in ('array', 'null'), true)
      and coalesce(jsonb_typeof(scope -> 'filters') in ('object', 'null'), true)) not valid;
  end if;
end
$$;
-- later: until version 3 an operator could write anything there, and what was no scope was none.
update projects set scope = null
where jsonb_typeof(scope) <> 'object'
  or jsonb_typeof(scope -> 'sources') not in ('array', 'null')
  or jsonb_typeof(scope -> 'filters') not in ('object', 'null');
-- later
alter table projects validate constraint projects_scope_check;

-- Since version 4. What its events are mostly written in: a text search configuration.
alter table projects add column if not exists language text not null default 'english';

-- Who may see which project, and as what. Every statement that a caller can cause joins it.
create or replace view project_access as
  select id as project_id, owner_id as user_id, 'owner' as access_role
  from projects
  where organization_id is null
  union all
  select
    p.id,
    m.user_id,
    case
      when p.owner_id = m.user_id then 'owner'
      when m.role = 'admin' or m.admin_until > baton_now() then 'admin'
      else 'member'
    end
  from projects p
  join members m on m.organization_id = p.organization_id;

create table if not exists api_keys (
  id uuid primary key default uuidv7(),
  user_id uuid not null references users on delete cascade,
  label text not null default '' check (length(label) <= 300),
  prefix text not null unique,  -- the first 11 characters, enough to recognise a key by
  digest bytea not null unique check (octet_length(digest) = 32),
  created_at timestamptz not null default baton_now(),
  revoked_at timestamptz
);

-- Those of the keys that are good no more.
create or replace function revoked_keys(p_key_ids uuid[]) returns setof uuid
language sql stable security definer set search_path = public, pg_temp as $$
  select id
  from unnest(p_key_ids) as given (id)
  where not exists (select from api_keys k where k.id = given.id and k.revoked_at is null)
$$;

-- Answers BT404 unless the user may see the project; what is foreign looks like what is not there.
create or replace function assert_project(p_user_id uuid, p_project_id uuid) returns void
language plpgsql stable as $$
begin
  perform from project_access where user_id = p_user_id and project_id = p_project_id;
  if not found then
    raise 'project_id: no project with this id is visible to this key.' using errcode = 'BT404';
  end if;
end
$$;

-- --- Limits -------------------------------------------------------------------------------
--
-- A policy admits at most its quota of requests in any 60 seconds, over all API processes: default
-- and poll by key, generate by user. Refused requests count for nothing. The counts of a crashed
-- server are forgotten, which is what unlogged means; in return no request waits for the disk.

create table if not exists limits (
  user_id uuid not null references users on delete cascade,
  policy text not null check (policy in ('default', 'poll', 'generate', 'waits')),
  quota int not null check (quota between 0 and 1000000),  -- 0: no limit
  primary key (user_id, policy)
);

-- One pair for each second of the last minute that admitted something: times[i] is when its last
-- request was admitted, totals[i + 1] how many had been by then; totals[1] is how many before. So a
-- row has at most 61 pairs, and both arrays only grow to the right. Much room in a page keeps
-- updates in it (HOT).
create unlogged table if not exists rate_windows (
  subject uuid not null,  -- a key or a user
  policy text not null,
  times timestamptz[] not null default '{}',
  totals bigint[] not null default '{0}',
  primary key (subject, policy)
) with (fillfactor = 25);

-- baton_now() of this very moment, also late in a transaction that had to wait for a lock.
create or replace function baton_clock() returns timestamptz
language sql volatile as $$
  select baton_now() + (clock_timestamp() - now())
$$;

-- How many pairs of a window have left it. All, when the clock was set back by more than a minute:
-- to count them until it has caught up would refuse everything for that long.
create or replace function window_expired(p_times timestamptz[], p_at timestamptz) returns int
language sql immutable as $$
  select case
    when p_times[cardinality(p_times)] > p_at + interval '60 seconds' then cardinality(p_times)
    else width_bucket(p_at - interval '60 seconds', p_times)
  end
$$;

create or replace function window_used(
  p_times timestamptz[], p_totals bigint[], p_at timestamptz
) returns bigint
language sql immutable as $$
  select p_totals[cardinality(p_totals)] - p_totals[1 + window_expired(p_times, p_at)]
$$;

-- Who a live key acts for, and whether that caller may go on: one request is counted in all the
-- policies, or in none when one of them refuses. No user: no such key. For each policy its quota, what
-- remains of it, and the seconds until there is more: a request that was refused is admitted then,
-- unless another one comes first. A quota of 0 is no limit, and nothing is written for it.
--
-- Callers name their policies in one order, so that two of them cannot deadlock.
create or replace function admit(
  p_digest bytea, p_policies text[], p_quotas int[],
  out user_id uuid, out key_id uuid, out quotas int[], out remaining bigint[], out resets int[],
  out refused text[]
) language plpgsql as $$
declare
  v_subject uuid;
  v_window rate_windows;
  v_windows rate_windows[];
  v_now timestamptz;
  v_expired int;
  v_last int;
begin
  select k.user_id, k.id into user_id, key_id
  from api_keys k
  where k.digest = p_digest and k.revoked_at is null;
  if not found then
    return;
  end if;
  quotas := p_quotas;
  if exists (select from limits l where l.user_id = admit.user_id) then
    quotas := array(
      select coalesce(l.quota, p.quota)
      from unnest(p_policies, p_quotas) with ordinality p (policy, quota, place)
      left join limits l on l.user_id = admit.user_id and l.policy = p.policy
      order by p.place);
  end if;

  remaining := array_fill(null::bigint, array[cardinality(p_policies)]);
  resets := array_fill(null::int, array[cardinality(p_policies)]);
  refused := '{}';
  for i in 1 .. cardinality(p_policies) loop
    continue when quotas[i] = 0;
    v_subject := case p_policies[i] when 'generate' then user_id else key_id end;
    v_now := baton_clock();
    loop
      -- Without room nothing is locked. With room it is looked for again under the lock.
      select * into v_window
      from rate_windows w
      where w.subject = v_subject and w.policy = p_policies[i]
        and window_used(w.times, w.totals, v_now) < quotas[i]
      for update;
      exit when found;
      insert into rate_windows (subject, policy) values (v_subject, p_policies[i])
      on conflict do nothing;
      continue when found;
      select * into v_window
      from rate_windows w
      where w.subject = v_subject and w.policy = p_policies[i];
      if window_used(v_window.times, v_window.totals, v_now) >= quotas[i] then
        refused := refused || p_policies[i];
        exit;
      end if;
    end loop;
    v_windows[i] := v_window;
  end loop;

  for i in 1 .. cardinality(p_policies) loop
    continue when quotas[i] = 0;
    v_window := v_windows[i];
    v_now := baton_clock();
    v_expired := window_expired(v_window.times, v_now);
    v_window.times := v_window.times[v_expired + 1:];
    v_window.totals := v_window.totals[v_expired + 1:];
    if refused = '{}' then
      v_last := cardinality(v_window.times);
      v_now := greatest(v_now, v_window.times[v_last]);
      if v_last = 0 or date_trunc('second', v_now) > v_window.times[v_last] then
        v_last := v_last + 1;
        v_window.totals[v_last + 1] := v_window.totals[v_last];
      end if;
      v_window.times[v_last] := v_now;
      v_window.totals[v_last + 1] := v_window.totals[v_last + 1] + 1;
      update rate_windows w
      set times = v_window.times, totals = v_window.totals
      where w.subject = v_window.subject and w.policy = v_window.policy;
    end if;
    v_last := cardinality(v_window.totals);
    remaining[i] := greatest(0, quotas[i] - (v_window.totals[v_last] - v_window.totals[1]));
    -- The first pair whose leaving makes room.
    v_last := greatest(1, width_bucket(v_window.totals[v_last] - quotas[i], v_window.totals));
    resets[i] := coalesce(
      ceil(extract(epoch from v_window.times[v_last] - v_now + interval '60 seconds')), 0);
  end loop;
end
$$;

-- One row for each request that is held open: at most the quota of them by key, over all processes.
-- A row that is not kept for a while belongs to a process that has died.
create unlogged table if not exists wait_slots (
  id uuid primary key default gen_random_uuid(),
  key_id uuid not null,
  expires_at timestamptz not null
);
create index if not exists wait_slots_key on wait_slots (key_id);

-- A slot for a request that is about to wait; none when the quota is 0, or when all are taken, in
-- which case remaining is null. p_released are slots that the caller gives up but has not deleted.
create or replace function take_wait_slot(
  p_user_id uuid, p_key_id uuid, p_quota int, p_seconds double precision, p_released uuid[],
  out slot uuid, out quota int, out remaining int
) language plpgsql as $$
begin
  quota := coalesce(
    (select l.quota from limits l where l.user_id = p_user_id and l.policy = 'waits'), p_quota);
  if quota = 0 then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('baton waits ' || p_key_id, 0));
  remaining := quota - 1 - (
    select count(*)
    from wait_slots w
    where w.key_id = p_key_id and w.expires_at > baton_now() and w.id <> all (p_released));
  if remaining < 0 then
    remaining := null;
    return;
  end if;
  insert into wait_slots (key_id, expires_at)
  values (p_key_id, baton_now() + p_seconds * interval '1 second')
  returning id into slot;
end
$$;

-- One statement per process and while, for all its slots: those that it holds stay, those that it
-- has released go, and so do the ones that nobody keeps.
create or replace function keep_wait_slots(
  p_held uuid[], p_released uuid[], p_seconds double precision
) returns void
language plpgsql as $$
begin
  delete from wait_slots where id = any (p_released);
  update wait_slots set expires_at = baton_now() + p_seconds * interval '1 second'
  where id = any (p_held);
  delete from wait_slots
  where id in (
    select id from wait_slots where expires_at < baton_now() for update skip locked);
end
$$;

-- --- Vocabulary ---------------------------------------------------------------------------

create table if not exists sources (
  name text primary key check (name ~ '^[a-z0-9_]{1,64}$'),
  label text not null,
  has_branches boolean not null default false,  -- also means: code lives there
  has_priorities boolean not null default false
);

insert into sources (name, label, has_branches, has_priorities) values
  ('github', 'GitHub', true, true),
  ('gitlab', 'GitLab', true, false),
  ('bitbucket', 'Bitbucket', true, false),
  ('azure_devops', 'Azure DevOps', true, false),
  ('jira', 'Jira', false, true),
  ('jira_service_management', 'Jira Service Management', false, true),
  ('linear', 'Linear', false, true),
  ('sentry', 'Sentry', false, true),
  ('pagerduty', 'PagerDuty', false, true),
  ('incident_io', 'incident.io', false, true),
  ('clickup', 'ClickUp', false, true),
  ('zendesk', 'Zendesk', false, true),
  ('snyk', 'Snyk', false, true),
  ('grafana', 'Grafana', false, true),
  ('alertmanager', 'Alertmanager', false, true),
  ('new_relic', 'New Relic', false, true),
  ('hubspot', 'HubSpot', false, true),
  ('salesforce', 'Salesforce', false, true),
  ('slack', 'Slack', false, false),
  ('discord', 'Discord', false, false),
  ('notion', 'Notion', false, false),
  ('confluence', 'Confluence', false, false),
  ('figma', 'Figma', false, false),
  ('microsoft_outlook', 'Microsoft Outlook', false, false),
  ('microsoft_teams', 'Microsoft Teams', false, false),
  ('datadog', 'Datadog', false, false),
  ('asana', 'Asana', false, false),
  ('gmail', 'Gmail', false, false),
  ('buildkite', 'Buildkite', false, false),
  ('circleci', 'CircleCI', false, false),
  ('vercel', 'Vercel', false, false),
  ('netlify', 'Netlify', false, false),
  ('render', 'Render', false, false),
  ('railway', 'Railway', false, false),
  ('cloudflare_pages', 'Cloudflare Pages', false, false),
  ('monday_com', 'monday.com', false, false),
  ('shortcut', 'Shortcut', false, false),
  ('intercom', 'Intercom', false, false),
  ('fireflies', 'Fireflies', false, false),
  ('zoom', 'Zoom', false, false),
  ('google_calendar', 'Google Calendar', false, false),
  ('google_drive', 'Google Drive', false, false),
  ('launchdarkly', 'LaunchDarkly', false, false),
  ('hcp_terraform', 'HCP Terraform', false, false),
  ('sonarqube', 'SonarQube', false, false),
  ('miro', 'Miro', false, false),
  ('posthog', 'PostHog', false, false),
  ('heroku', 'Heroku', false, false),
  ('pulumi', 'Pulumi', false, false),
  ('google_meet', 'Google Meet', false, false),
  ('microsoft_teams_meetings', 'Microsoft Teams Meetings', false, false),
  ('fathom', 'Fathom', false, false)
on conflict (name) do nothing;

create table if not exists flows (
  kind text primary key,
  credits int not null check (credits >= 0)
);

insert into flows (kind, credits) values
  ('handoff', 1),
  ('cross_source_correlation', 2),
  ('onboarding_brief', 2),
  ('release_notes', 3),
  ('architecture_insight', 5),
  ('question', 2),
  ('digest', 1)
on conflict (kind) do nothing;

-- --- Events -------------------------------------------------------------------------------

create table if not exists events (
  id uuid primary key default uuidv7(),
  user_id uuid not null references users,
  project_id uuid not null references projects on delete cascade,
  source text not null references sources,
  event_type text not null,
  title text not null,
  content text,
  external_id text,
  resource text,
  branch text,
  priority text,
  author text,
  url text,
  metadata jsonb not null default '{}',
  occurred_at timestamptz not null,
  created_at timestamptz not null default baton_now()
);
create unique index if not exists events_external on events (project_id, source, external_id)
  where external_id is not null;
create index if not exists events_recent on events (project_id, occurred_at desc, id desc);
create index if not exists events_recent_by_source
  on events (project_id, source, occurred_at desc, id desc);
-- Releases are rare among events, and release notes start by finding the last two.
create index if not exists events_releases on events (project_id, source, occurred_at desc, id desc)
  where event_type in ('tag', 'release', 'release.published');

create table if not exists event_facets (
  project_id uuid not null references projects on delete cascade,
  source text not null references sources,
  dimension text not null check (dimension in ('projects', 'eventTypes', 'branches', 'priorities')),
  resource text not null default '',  -- branches belong to a resource, the other values to none
  value text not null,
  primary key (project_id, source, dimension, resource, value)
);

-- Store events in a project, as their user's; all sources are known. One whose external id is there
-- already, or twice in the batch, is left out. Answers how many were stored. Rows are written in the
-- order of their keys, so that two batches cannot deadlock.
create or replace function store_events(p_user_id uuid, p_project_id uuid, p_events jsonb)
returns int
language plpgsql as $$
declare
  v_stored int;
begin
  with incoming as (
    select *
    from jsonb_to_recordset(p_events) as e (
      source text, event_type text, title text, content text, external_id text, resource text,
      branch text, priority text, author text, url text, metadata jsonb, occurred_at timestamptz)
  ),
  stored as (
    insert into events (
      user_id, project_id, source, event_type, title, content, external_id, resource, branch,
      priority, author, url, metadata, occurred_at)
    select
      p_user_id, p_project_id, source, event_type, title, content, external_id, resource, branch,
      priority, author, url, coalesce(metadata, '{}'), coalesce(occurred_at, baton_now())
    from incoming
    order by source, external_id
    on conflict (project_id, source, external_id) where external_id is not null do nothing
    returning source, event_type, resource, branch, priority
  ),
  facets as (
    select source, 'projects' as dimension, '' as resource, resource as value from stored
    union
    select source, 'eventTypes', '', event_type from stored
    union
    select source, 'branches', coalesce(resource, ''), branch from stored
    union
    select source, 'priorities', '', priority from stored
  ),
  noted as (
    insert into event_facets (project_id, source, dimension, resource, value)
    select p_project_id, source, dimension, resource, value
    from facets
    where value is not null
    order by source, dimension, resource, value
    on conflict do nothing
  )
  select count(*) into v_stored from stored;
  return v_stored;
end
$$;

-- Store a batch of events for a project that the user may see. A wrong source refuses the whole
-- batch; an external id that is already there, or twice in the batch, counts as a duplicate.
create or replace function ingest_events(
  p_user_id uuid, p_project_id uuid, p_events jsonb, out accepted int, out duplicates int
) language plpgsql as $$
declare
  v_index bigint;
  v_source text;
begin
  perform assert_project(p_user_id, p_project_id);

  select e.ordinality - 1, e.value ->> 'source' into v_index, v_source
  from jsonb_array_elements(p_events) with ordinality e
  where not exists (select from sources s where s.name = e.value ->> 'source')
  order by e.ordinality
  limit 1;
  if found then
    raise 'events[%].source: there is no source named "%".', v_index, v_source
      using errcode = 'BT400';
  end if;

  accepted := store_events(p_user_id, p_project_id, p_events);
  duplicates := jsonb_array_length(p_events) - accepted;
end
$$;

-- --- Integrations -------------------------------------------------------------------------
--
-- An integration is what a source sends to: it belongs to a user or to an organization, and names the
-- secrets that its deliveries are verified with. What it sends is of resources, and a resource is of
-- at most one project; events of one that is of none wait.

create table if not exists integrations (
  id uuid primary key default uuidv7(),  -- the address that the source sends to: /hooks/{id}
  source text not null references sources,
  user_id uuid not null references users,  -- who connected it; its events are theirs
  organization_id uuid references organizations on delete cascade,  -- null: the user's own
  project_id uuid references projects on delete set null,  -- of new resources; null: they wait
  workspace_id text check (length(workspace_id) <= 300),  -- what the source calls it: a team, a guild
  workspace_name text not null check (length(workspace_name) between 1 and 300),
  settings jsonb not null default '{}',  -- nothing secret
  enabled boolean not null default true,
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now()
);
create index if not exists integrations_user on integrations (user_id);
create index if not exists integrations_organization on integrations (organization_id);

-- Encrypted by the processes, whose environment has the key (app/cipher.py). Of one name the newest is
-- in use; one that was rotated is good until it expires, as the source may still sign with it.
create table if not exists integration_secrets (
  id uuid primary key default uuidv7(),
  integration_id uuid not null references integrations on delete cascade,
  name text not null check (name in ('signing', 'token')),  -- verifies what comes in; calls the source
  value bytea not null,
  created_at timestamptz not null default baton_now(),
  expires_at timestamptz  -- null: the current one
);
create unique index if not exists integration_secrets_current
  on integration_secrets (integration_id, name) where expires_at is null;

-- The values of a secret that are good now, the newest first.
create or replace function live_secrets(p_integration_id uuid, p_name text) returns bytea[]
language sql stable as $$
  select coalesce(array_agg(value order by expires_at is null desc, id desc), '{}')
  from integration_secrets
  where integration_id = p_integration_id and name = p_name
    and (expires_at is null or expires_at > baton_now())
$$;

-- What the source is called with, to be decrypted; null: there is no token.
create or replace function read_integration_token(p_integration_id uuid) returns bytea
language sql stable as $$
  select (live_secrets(p_integration_id, 'token'))[1]
$$;

-- By which integrations of a source a user may post there: the user's own, and those of the user's
-- organizations. The token is to be decrypted.
create or replace function chat_accounts(p_user_id uuid, p_source text) returns table (
  integration_id uuid, workspace_id text, token bytea
) language sql stable as $$
  select id, workspace_id, token
  from (
    select i.id, nullif(i.workspace_id, '') as workspace_id, read_integration_token(i.id) as token
    from integrations i
    where i.source = p_source and i.enabled
      and case
        when i.organization_id is null then i.user_id = p_user_id
        else exists (
          select from members m
          where m.organization_id = i.organization_id and m.user_id = p_user_id)
        end
  ) a
  where token is not null
  order by id
$$;

-- Keep the secret that the source made, if the integration has none yet: whoever comes later with
-- another one is not the source. Answers whether it was kept.
create or replace function keep_first_secret(p_integration_id uuid, p_value bytea) returns boolean
language plpgsql as $$
begin
  perform from integrations where id = p_integration_id and enabled for update;
  if not found or live_secrets(p_integration_id, 'signing') <> '{}' then
    return false;
  end if;
  insert into integration_secrets (integration_id, name, value)
  values (p_integration_id, 'signing', p_value);
  return true;
end
$$;

create table if not exists resources (
  integration_id uuid not null references integrations on delete cascade,
  id text not null check (length(id) between 1 and 300),  -- events.resource
  name text not null check (length(name) between 1 and 300),
  type text not null check (length(type) between 1 and 64),  -- repository, channel, board, …
  project_id uuid references projects on delete set null,  -- null: its events wait
  default_branch text check (length(default_branch) between 1 and 300),
  pulling boolean not null default false,  -- it has got a project, and events of it may still wait
  created_at timestamptz not null default baton_now(),
  last_event_at timestamptz not null default baton_now(),
  asked_at timestamptz,  -- when the source was last asked for the name; null: never
  primary key (integration_id, id)
);
create index if not exists resources_project on resources (project_id);
alter table resources
  add column if not exists asked_at timestamptz,
  add column if not exists pulling boolean not null default false;
create index if not exists resources_pulling on resources (integration_id, id) where pulling;

create table if not exists people (
  integration_id uuid not null references integrations on delete cascade,
  id text not null check (length(id) between 1 and 300),  -- events.author
  name text check (length(name) between 1 and 300),  -- null: the source was asked in vain, or is
  asked_at timestamptz not null default baton_now(),
  primary key (integration_id, id)
);

-- What has been sent, as long as the source may send it again.
create table if not exists hook_deliveries (
  integration_id uuid not null references integrations on delete cascade,
  delivery_id text not null check (length(delivery_id) between 1 and 300),
  received_at timestamptz not null default baton_now(),
  error text,  -- why it became no event; null: it did, or waits
  primary key (integration_id, delivery_id)
);
create index if not exists hook_deliveries_age on hook_deliveries (received_at);
create index if not exists hook_deliveries_failed on hook_deliveries (received_at)
  where error is not null;

-- Those that are to be mapped, as they came. Apart from hook_deliveries, so that what stays is small
-- and is never written again, and what passes through leaves nothing behind.
create table if not exists waiting_deliveries (
  integration_id uuid not null references integrations on delete cascade,
  seq bigint generated always as identity,
  delivery_id text not null,
  headers jsonb not null,  -- those that say what the body is; lower-case names
  body bytea not null,
  size int not null,  -- bytes of the body
  received_at timestamptz not null default baton_now(),
  primary key (integration_id, seq) include (size, received_at)
);

-- Bodies stay for seconds: to compress them takes longer than all the rest of storing them.
do $$
begin
  if exists (
    select from pg_attribute
    where attrelid = 'waiting_deliveries'::regclass and attname = 'body' and attstorage <> 'e') then
    alter table waiting_deliveries alter body set storage external;
  end if;
end
$$;

-- How many there were of each result in an hour, as API processes add them up: of the last two days,
-- and the last hour of each.
create table if not exists hook_counts (
  integration_id uuid not null references integrations on delete cascade,
  result text not null check (result in (
    'accepted', 'duplicate', 'unverified', 'malformed', 'too_large', 'full')),
  hour timestamptz not null,
  count bigint not null,
  last_at timestamptz not null,
  primary key (integration_id, result, hour)
);
create index if not exists hook_counts_hour on hook_counts (hour);

create table if not exists untracked_events (
  id uuid primary key default uuidv7(),
  integration_id uuid not null,
  resource_id text not null,
  external_id text,
  event jsonb not null,  -- as store_events takes it
  created_at timestamptz not null default baton_now(),
  foreign key (integration_id, resource_id) references resources on delete cascade
);
create unique index if not exists untracked_events_external
  on untracked_events (integration_id, external_id) where external_id is not null;
create index if not exists untracked_events_resource
  on untracked_events (integration_id, resource_id, id);

-- What the API has to know of integrations to take what they send: of those that are there and enabled,
-- with the secrets that are good, the newest first, and how much of theirs waits, counted up to p_most
-- deliveries.
create or replace function hook_integrations(p_ids uuid[], p_most int) returns table (
  id uuid, source text, secrets bytea[], waiting int, waiting_bytes bigint
) language sql stable as $$
  select i.id, i.source, live_secrets(i.id, 'signing'), w.waiting, w.bytes
  from integrations i
  cross join lateral (
    select count(*)::int as waiting, coalesce(sum(size), 0)::bigint as bytes
    from (select size from waiting_deliveries d where d.integration_id = i.id limit p_most) d
  ) w
  where i.id = any (p_ids) and i.enabled
$$;

-- Store deliveries that have been verified, each once; the arrays have one element each for each.
-- Answers a word for each: accepted; duplicate; or unknown, when its integration has been deleted or
-- disabled. Rows are written in the order of their keys, so that two batches cannot deadlock.
create or replace function store_hook_deliveries(
  p_integration_ids uuid[], p_delivery_ids text[], p_headers jsonb[], p_bodies bytea[]
) returns text[]
language plpgsql as $$
declare
  v_known uuid[] := array(
    select id from integrations where id = any (p_integration_ids) and enabled
    order by id for key share);
  v_results text[];
begin
  with incoming as (
    select d.*, row_number() over (partition by integration_id, delivery_id order by n) = 1 as first
    from unnest(p_integration_ids, p_delivery_ids) with ordinality d (integration_id, delivery_id, n)
  ),
  stored as (
    insert into hook_deliveries (integration_id, delivery_id)
    select integration_id, delivery_id
    from incoming
    where first and integration_id = any (v_known)
    order by integration_id, delivery_id
    on conflict do nothing
    returning integration_id, delivery_id
  ),
  fresh as (
    select n, integration_id, delivery_id
    from incoming join stored using (integration_id, delivery_id)
    where first
  ),
  waiting as (
    insert into waiting_deliveries (integration_id, delivery_id, headers, body, size)
    select integration_id, delivery_id, p_headers[n], p_bodies[n], octet_length(p_bodies[n])
    from fresh
    order by n
  )
  select array_agg(
    case
      when f.n is not null then 'accepted'
      when i.integration_id = any (v_known) then 'duplicate'
      else 'unknown'
    end
    order by i.n)
  into v_results
  from incoming i
  left join fresh f on f.n = i.n;
  return v_results;
end
$$;

-- Add up what API processes have counted; the arrays have one element each for each.
create or replace function count_hooks(p_integration_ids uuid[], p_results text[], p_counts bigint[])
returns void
language sql as $$
  insert into hook_counts (integration_id, result, hour, count, last_at)
  select i.id, c.result, date_trunc('hour', baton_now()), c.count, baton_now()
  from unnest(p_integration_ids, p_results, p_counts) as c (integration_id, result, count)
  join integrations i on i.id = c.integration_id
  order by 1, 2
  on conflict (integration_id, result, hour) do update
  set count = hook_counts.count + excluded.count, last_at = excluded.last_at;
  delete from hook_counts c
  where c.integration_id = any (p_integration_ids) and c.hour < baton_now() - interval '2 days'
    and exists (
      select from hook_counts later
      where later.integration_id = c.integration_id and later.result = c.result
        and later.hour > c.hour);
$$;

-- The integrations with deliveries that wait, at most p_limit, beginning after one of them: from one
-- to the next by the index, so that the many of one are not in the way of the others. None in
-- a database that is held.
create or replace function waiting_integrations(p_after uuid, p_limit int) returns setof uuid
language plpgsql stable as $$
begin
  if hold_reason() is not null then
    return;
  end if;
  return query
  with recursive waiting (id, n) as (
    (select integration_id, 1 from waiting_deliveries
     where integration_id > p_after order by integration_id limit 1)
    union all
    select
      (select d.integration_id from waiting_deliveries d
       where d.integration_id > w.id order by d.integration_id limit 1),
      w.n + 1
    from waiting w
    where w.id is not null and w.n < p_limit
  )
  select id from waiting where id is not null;
end
$$;

-- The oldest deliveries of an integration that wait: at most p_limit, and no more than p_bytes but for
-- the first. Until the end of the transaction no other worker gets any of this integration, so that
-- they are mapped in order.
create or replace function take_deliveries(p_integration_id uuid, p_limit int, p_bytes bigint)
returns table (
  seq bigint, delivery_id text, source text, headers jsonb, body bytea, received_at timestamptz
) language plpgsql as $$
#variable_conflict use_column
begin
  if hold_reason() is not null
    or not pg_try_advisory_xact_lock(hashtextextended('baton intake ' || p_integration_id, 0)) then
    return;
  end if;
  return query
  select d.seq, d.delivery_id, i.source, d.headers, d.body, d.received_at
  from (
    select seq, sum(size) over (order by seq) - size as before
    from (
      select seq, size from waiting_deliveries
      where integration_id = p_integration_id order by seq limit p_limit
    ) oldest
  ) bounded
  join waiting_deliveries d on d.integration_id = p_integration_id and d.seq = bounded.seq
  join integrations i on i.id = d.integration_id
  where before = 0 or before + d.size <= p_bytes
  order by d.seq;
end
$$;

-- Store what a mapping made of an integration's deliveries: SourceEvent.row of tasks/sources/event.py,
-- of which `in` says what it happened in. A resource that is new belongs to the integration's project,
-- if that has one. Events of a resource with a project are stored there; the others wait. Answers how
-- many were new. The rows of resources are locked until the end, so that none of their events can be
-- missed by who gives one to a project.
create or replace function store_source_events(p_integration_id uuid, p_events jsonb) returns int
language plpgsql as $$
declare
  v_integration integrations;
  v_events jsonb := p_events;
  v_stored int := 0;
  v_project record;
  v_new int;
begin
  select * into v_integration from integrations where id = p_integration_id for key share;
  if not found or jsonb_array_length(p_events) = 0 then
    return 0;
  end if;

  -- What happened in nothing in particular happened in the workspace.
  if jsonb_path_exists(p_events, '$[*] ? (@.in == null)') then
    select jsonb_agg(
      case when jsonb_typeof(e -> 'in') = 'object' then e
      else e || jsonb_build_object('resource', w.id, 'in', jsonb_build_object(
        'id', w.id, 'name', v_integration.workspace_name, 'type', 'workspace'))
      end order by n)
    into v_events
    from jsonb_array_elements(p_events) with ordinality a (e, n)
    cross join (select coalesce(nullif(v_integration.workspace_id, ''), v_integration.source)) w (id);
  end if;

  insert into resources as r (integration_id, id, name, type, project_id, default_branch)
  select distinct on (e #>> '{in,id}')
    v_integration.id, e #>> '{in,id}', e #>> '{in,name}', e #>> '{in,type}', v_integration.project_id,
    e #>> '{in,default_branch}'
  from jsonb_array_elements(v_events) with ordinality a (e, n)
  order by e #>> '{in,id}', n desc
  on conflict (integration_id, id) do update
  -- A source that calls it by its id has not forgotten the name that is known.
  set name = case when excluded.name = excluded.id then r.name else excluded.name end,
    type = excluded.type, last_event_at = excluded.last_event_at,
    default_branch = coalesce(excluded.default_branch, r.default_branch)
  -- Not for every batch: what is busy would be written many times a second.
  where r.last_event_at < excluded.last_event_at - interval '10 seconds'
    or (r.name, r.type) <> (
      case when excluded.name = excluded.id then r.name else excluded.name end, excluded.type)
    or r.default_branch is distinct from coalesce(excluded.default_branch, r.default_branch);
  perform from resources
  where integration_id = v_integration.id
    and id in (select e #>> '{in,id}' from jsonb_array_elements(v_events) a (e))
  order by id
  for share;

  for v_project in
    select r.project_id, jsonb_agg(e - 'in' order by n) as events
    from jsonb_array_elements(v_events) with ordinality a (e, n)
    join resources r on r.integration_id = v_integration.id and r.id = e #>> '{in,id}'
    where r.project_id is not null
    group by r.project_id
    order by r.project_id
  loop
    v_stored := v_stored + store_events(
      v_integration.user_id, v_project.project_id, v_project.events);
  end loop;

  insert into untracked_events (integration_id, resource_id, external_id, event)
  select v_integration.id, r.id, e ->> 'external_id', e - 'in'
  from jsonb_array_elements(v_events) with ordinality a (e, n)
  join resources r on r.integration_id = v_integration.id and r.id = e #>> '{in,id}'
  where r.project_id is null
  order by e ->> 'external_id', n
  on conflict (integration_id, external_id) where external_id is not null do nothing;
  get diagnostics v_new = row_count;
  return v_stored + v_new;
end
$$;

-- Channels and people whose names Slack is to be asked, with the token for it: channels that have
-- sent something, and who has written lately. Whoever takes one asks for it; while it has no name it
-- is offered again a day later. One worker at a time finds some.
create or replace function take_nameless(p_limit int)
returns table (integration_id uuid, type text, id text, token bytea) language plpgsql as $$
#variable_conflict use_column
declare
  v_then constant timestamptz := baton_now() - interval '1 day';
begin
  if hold_reason() is not null
    or not pg_try_advisory_xact_lock(hashtextextended('baton names', 0)) then
    return;
  end if;
  return query
  with able as materialized (
    select i.id as integration_id, read_integration_token(i.id) as token
    from integrations i
    where i.source = 'slack' and i.enabled
  ),
  nameless as (
    select a.integration_id, 'channel' as type, r.id
    from able a
    join resources r on r.integration_id = a.integration_id
    where a.token is not null and r.type = 'channel' and r.name = r.id
      and coalesce(r.asked_at < v_then, true)
    union all
    select distinct a.integration_id, 'person', e.author
    from able a
    join (
      select distinct integration_id, project_id from resources where project_id is not null
    ) r on r.integration_id = a.integration_id
    cross join lateral (
      select author from events
      where project_id = r.project_id and source = 'slack'
      order by occurred_at desc, id desc
      limit 500
    ) e
    where a.token is not null and e.author ~ '^[UW][A-Z0-9]{7,11}$' and not exists (
      select from people p
      where p.integration_id = a.integration_id and p.id = e.author
        and (p.name is not null or p.asked_at >= v_then))
  ),
  taken as materialized (
    select n.*
    from (
      select *, row_number() over (partition by integration_id order by type, id) as nth
      from nameless
    ) n
    order by n.nth, n.integration_id
    limit p_limit
  ),
  channels as (
    update resources r set asked_at = baton_now()
    from taken t
    where t.type = 'channel' and r.integration_id = t.integration_id and r.id = t.id
  ),
  persons as (
    insert into people as p (integration_id, id)
    select t.integration_id, t.id from taken t where t.type = 'person'
    on conflict (integration_id, id) do update set asked_at = excluded.asked_at
  )
  select t.integration_id, t.type, t.id, a.token
  from taken t
  join able a on a.integration_id = t.integration_id
  order by t.nth, t.integration_id;
end
$$;

-- What artifacts of a project say instead of ids. A repository keeps its own, by which all refer to it.
create or replace function names_in(p_project_id uuid)
returns table (type text, known_as text, name text) language sql stable as $$
  select 'resource', r.id, min(r.name)
  from resources r
  where r.project_id = p_project_id and r.type <> 'repository' and r.name <> r.id
  group by r.id
  union all
  select 'person', p.id, min(p.name)
  from people p
  where p.name is not null
    and p.integration_id in (select integration_id from resources where project_id = p_project_id)
  group by p.id
$$;

-- What Slack has answered: a name, or that it is to be asked again in so many seconds.
create or replace function name_it(
  p_integration_id uuid, p_type text, p_id text, p_name text, p_again double precision
) returns void language sql as $$
  update resources
  set name = coalesce(left(p_name, 300), name),
    asked_at = coalesce(baton_now() - interval '1 day' + make_interval(secs => p_again), asked_at)
  where p_type = 'channel' and integration_id = p_integration_id and id = p_id;
  update people
  set name = coalesce(left(p_name, 300), name),
    asked_at = coalesce(baton_now() - interval '1 day' + make_interval(secs => p_again), asked_at)
  where p_type = 'person' and integration_id = p_integration_id and id = p_id;
$$;

-- Store the events of deliveries and wait for these no more. With p_error they have become none, and
-- it says why. Answers null, or, when the database refuses the events, the SQLSTATE of why: then
-- nothing has happened. What passes by itself is no fault of a delivery, and is raised.
create or replace function end_deliveries(
  p_integration_id uuid, p_seqs bigint[], p_events jsonb, p_error text
) returns text
language plpgsql as $$
declare
  v_ids text[];
begin
  perform store_source_events(p_integration_id, p_events);
  with gone as (
    delete from waiting_deliveries
    where integration_id = p_integration_id and seq = any (p_seqs)
    returning delivery_id
  )
  select array_agg(delivery_id) into v_ids from gone;
  if p_error is not null then
    update hook_deliveries set error = left(p_error, 300)
    where integration_id = p_integration_id and delivery_id = any (v_ids);
  end if;
  return null;
exception when others then
  if left(sqlstate, 2) in ('40', '53', '55', '57', '58', 'XX') then
    raise;
  end if;
  return sqlstate;
end
$$;

-- What an import has read, so that the next one goes on there. Events are stored first, and once.
create table if not exists import_cursors (
  project_id uuid not null references projects on delete cascade,
  source text not null references sources,
  resource text not null check (length(resource) between 1 and 300),
  stream text not null check (length(stream) between 1 and 64),  -- issues, comments, releases, …
  since timestamptz,  -- what happened before was left out; null: nothing was
  cursor text check (length(cursor) <= 300),  -- the source's own; null: it has none
  etag text check (length(etag) <= 300),  -- of the last answer, by which the source knows it again
  updated_at timestamptz not null default baton_now(),
  primary key (project_id, source, resource, stream)
);

create or replace function save_import_cursor(
  p_project_id uuid, p_source text, p_resource text, p_stream text, p_since timestamptz,
  p_cursor text, p_etag text
) returns void
language sql as $$
  insert into import_cursors (project_id, source, resource, stream, since, cursor, etag)
  values (p_project_id, p_source, p_resource, p_stream, p_since, p_cursor, p_etag)
  on conflict (project_id, source, resource, stream) do update
  set since = excluded.since, cursor = excluded.cursor, etag = excluded.etag,
    updated_at = excluded.updated_at
$$;

-- Who may see which integration, and as what: one's own, and those of one's organizations. Of the
-- latter, who is an admin there may change them.
create or replace view integration_access as
  select id as integration_id, user_id, 'owner' as access_role
  from integrations
  where organization_id is null
  union all
  select
    i.id, m.user_id,
    case when m.role = 'admin' or m.admin_until > baton_now() then 'admin' else 'member' end
  from integrations i
  join members m on m.organization_id = i.organization_id;

-- An integration as a client sees it. providers_connected is what it brings in, here always one source;
-- last_validated_at is when it last sent something that was verified.
create or replace view integration_objects as
select
  i.id, i.source, coalesce(i.workspace_id, i.id::text) as workspace_id, i.workspace_name,
  i.created_at as connected_at,
  case when i.organization_id is null then 'personal' else 'organization' end as scope,
  r.resource_type,
  case
    when not i.enabled then 'disabled'
    when not exists (
      select from integration_secrets s
      where s.integration_id = i.id and s.name = 'signing' and s.expires_at is null)
      then 'awaiting_secret'
    when greatest(r.last_event_at, c.last_at) is null then 'awaiting_first_delivery'
    else 'connected'
  end as connection_status,
  array[i.source] as providers_connected,
  greatest(r.last_event_at, c.last_at) as last_validated_at,
  i.organization_id, i.project_id, i.enabled,
  exists (
    select from integration_secrets s
    where s.integration_id = i.id and s.name = 'token' and s.expires_at is null) as has_token,
  i.updated_at
from integrations i
cross join lateral (
  select mode() within group (order by type) as resource_type, max(last_event_at) as last_event_at
  from resources
  where integration_id = i.id
) r
cross join lateral (
  select max(last_at) as last_at
  from hook_counts
  where integration_id = i.id and result in ('accepted', 'duplicate')
) c;

-- Answers BT404 or BT403 unless the role, null when nothing was found, may change the integration.
create or replace function assert_integration_admin(p_access_role text, p_field text) returns void
language plpgsql immutable as $$
begin
  if p_access_role is null then
    raise '%: no integration with this id is visible to this key.', p_field using errcode = 'BT404';
  elsif p_access_role = 'member' then
    raise 'Only an admin of the organization may do this to its integrations.'
      using errcode = 'BT403';
  end if;
end
$$;

create or replace function integration_role(p_user_id uuid, p_integration_id uuid) returns text
language sql stable as $$
  select access_role from integration_access
  where user_id = p_user_id and integration_id = p_integration_id
$$;

-- The integration, locked, when the user may change it.
create or replace function lock_integration(p_user_id uuid, p_integration_id uuid)
returns integrations
language plpgsql as $$
declare
  v_integration integrations;
begin
  perform assert_integration_admin(
    integration_role(p_user_id, p_integration_id), 'integration_id');
  select * into v_integration from integrations where id = p_integration_id for no key update;
  if not found then
    perform assert_integration_admin(null, 'integration_id');
  end if;
  return v_integration;
end
$$;

-- Answers BT400 unless what the integration sends may become events of the project: one of an
-- organization has the projects of that organization, one of a user those that the user owns.
create or replace function assert_reach(
  p_user_id uuid, p_organization_id uuid, p_project_id uuid, p_field text
) returns void
language plpgsql stable as $$
begin
  if p_organization_id is not null then
    perform from projects where id = p_project_id and organization_id = p_organization_id;
    if not found then
      raise '%: an integration of an organization reaches projects of that organization only.',
        p_field using errcode = 'BT400';
    end if;
  elsif project_role(p_user_id, p_project_id) is distinct from 'owner' then
    raise '%: an integration of a user reaches projects that this user owns only.',
      p_field using errcode = 'BT400';
  end if;
end
$$;

-- Give an integration a secret. What it had by this name is good for so long still; a null value takes
-- away all that there is.
create or replace function replace_secret(
  p_integration_id uuid, p_name text, p_value bytea, p_keep interval
) returns void
language sql as $$
  delete from integration_secrets
  where integration_id = p_integration_id and name = p_name
    and (expires_at <= baton_now() or p_keep <= '0' or p_value is null);
  update integration_secrets
  set expires_at = least(expires_at, baton_now() + p_keep)
  where integration_id = p_integration_id and name = p_name;
  insert into integration_secrets (integration_id, name, value)
  select p_integration_id, p_name, p_value
  where p_value is not null;
$$;

-- An integration of the organization, or without one of the user. Secret and token come encrypted.
create or replace function add_integration(
  p_user_id uuid, p_organization_id uuid, p_source text, p_workspace_id text,
  p_workspace_name text, p_project_id uuid, p_secret bytea, p_token bytea
) returns uuid
language plpgsql as $$
declare
  v_id uuid;
begin
  if not exists (select from sources where name = p_source) then
    raise 'source: there is no source named "%".', p_source using errcode = 'BT400';
  end if;
  if p_project_id is not null then
    perform assert_reach(p_user_id, p_organization_id, p_project_id, 'project_id');
  end if;
  -- One at a time, so that the cap is one.
  perform pg_advisory_xact_lock(hashtextextended(
    'baton integrations ' || coalesce(p_organization_id, p_user_id), 0));
  if (
    select count(*) from integrations
    where case when p_organization_id is null
      then organization_id is null and user_id = p_user_id
      else organization_id = p_organization_id end) >= 200 then
    raise 'There are 200 integrations already, which is the most; delete one first.'
      using errcode = 'BT409';
  end if;
  insert into integrations (
    source, user_id, organization_id, project_id, workspace_id, workspace_name)
  values (
    p_source, p_user_id, p_organization_id, p_project_id, p_workspace_id,
    coalesce(p_workspace_name, (select label from sources where name = p_source)))
  returning id into v_id;
  perform replace_secret(v_id, 'signing', p_secret, '0');
  perform replace_secret(v_id, 'token', p_token, '0');
  return v_id;
end
$$;

-- The same for a caller. Without an organization it is that of the project, if the caller may connect
-- something to it, else the caller's own. BT404, BT403, BT400, BT409.
create or replace function create_integration(
  p_user_id uuid, p_organization_id uuid, p_source text, p_workspace_id text,
  p_workspace_name text, p_project_id uuid, p_secret bytea, p_token bytea
) returns uuid
language plpgsql as $$
declare
  v_role text;
  v_organization_id uuid := p_organization_id;
begin
  if p_project_id is not null then
    v_role := project_role(p_user_id, p_project_id);
    if v_role is null then
      perform assert_project(p_user_id, p_project_id);
    elsif v_role = 'member' then
      raise 'Only an owner or admin of the project may connect something to it.'
        using errcode = 'BT403';
    end if;
    v_organization_id := coalesce(p_organization_id, (
      select p.organization_id
      from projects p
      join members m on m.organization_id = p.organization_id and m.user_id = p_user_id
      where p.id = p_project_id and (m.role = 'admin' or m.admin_until > baton_now())));
  end if;
  if p_organization_id is not null then
    v_role := (
      select case when role = 'admin' or admin_until > baton_now() then 'admin' else role end
      from members where organization_id = p_organization_id and user_id = p_user_id);
    if v_role is null then
      raise 'organization_id: no organization with this id is visible to this key.'
        using errcode = 'BT404';
    end if;
    perform assert_integration_admin(v_role, 'organization_id');
  end if;
  return add_integration(
    p_user_id, v_organization_id, p_source, p_workspace_id, p_workspace_name, p_project_id,
    p_secret, p_token);
end
$$;

-- Change what is named in p_changes: workspace_name, enabled, project_id (of new resources), and with
-- `token` the token, to p_token. BT404, BT403, BT400.
create or replace function update_integration(
  p_user_id uuid, p_integration_id uuid, p_changes jsonb, p_token bytea
) returns void
language plpgsql as $$
declare
  v_integration integrations := lock_integration(p_user_id, p_integration_id);
  v_project_id uuid := p_changes ->> 'project_id';
begin
  if v_project_id is not null then
    perform assert_project(p_user_id, v_project_id);
    perform assert_reach(
      v_integration.user_id, v_integration.organization_id, v_project_id, 'project_id');
  end if;
  update integrations
  set
    workspace_name = coalesce(p_changes ->> 'workspace_name', workspace_name),
    enabled = coalesce((p_changes ->> 'enabled')::boolean, enabled),
    project_id = case when p_changes ? 'project_id' then v_project_id else project_id end,
    updated_at = baton_now()
  where id = p_integration_id;
  if p_changes ? 'token' then
    perform replace_secret(p_integration_id, 'token', p_token, '0');
  end if;
end
$$;

-- A new signing secret; the old one is good for 24 hours more, until the source has learnt of the new
-- one. BT404, BT403.
create or replace function rotate_integration(
  p_user_id uuid, p_integration_id uuid, p_secret bytea
) returns void
language plpgsql as $$
begin
  perform lock_integration(p_user_id, p_integration_id);
  perform replace_secret(p_integration_id, 'signing', p_secret, '24 hours');
end
$$;

-- Delete an integration and what of it is no event of a project. From the first call on it takes
-- nothing more; each removes about p_limit rows of each kind. Answers whether there was nothing left
-- to remove, and it is gone. The integration is locked before its rows, as where these are written.
create or replace function remove_integration(p_integration_id uuid, p_limit int) returns boolean
language plpgsql as $$
declare
  v_table text;
  v_removed int;
  v_left boolean := false;
begin
  perform from integrations where id = p_integration_id for update;
  update integrations set enabled = false where id = p_integration_id and enabled;
  delete from integration_secrets where integration_id = p_integration_id;
  foreach v_table in array '{waiting_deliveries, hook_deliveries, untracked_events}'::text[] loop
    execute format(
      'delete from %1$I where ctid = any (array('
      'select ctid from %1$I where integration_id = $1 limit $2))', v_table)
    using p_integration_id, p_limit;
    get diagnostics v_removed = row_count;
    v_left := v_left or v_removed = p_limit;
  end loop;
  if v_left then
    return false;
  end if;
  delete from integrations where id = p_integration_id;
  return true;
end
$$;

-- The same for a caller. BT404, BT403.
create or replace function delete_integration(
  p_user_id uuid, p_integration_id uuid, p_limit int
) returns boolean
language plpgsql as $$
begin
  perform assert_integration_admin(
    integration_role(p_user_id, p_integration_id), 'integration_id');
  return remove_integration(p_integration_id, p_limit);
end
$$;

-- Give resources, two arrays with the two halves of their keys, to a project, or with null to none.
-- Events that wait come in by pull_events. The rows are locked in the order of their keys, and before
-- any event is written, as in store_source_events: so none is stored in between and forgotten.
create or replace function move_resources(
  p_integration_ids uuid[], p_ids text[], p_project_id uuid
) returns void
language plpgsql as $$
begin
  perform from resources r
  join unnest(p_integration_ids, p_ids) as w (integration_id, id) using (integration_id, id)
  order by r.integration_id, r.id
  for no key update of r;
  update resources r
  set project_id = p_project_id, pulling = p_project_id is not null
  from unnest(p_integration_ids, p_ids) as w (integration_id, id)
  where r.integration_id = w.integration_id and r.id = w.id
    and (r.project_id is distinct from p_project_id or p_project_id is not null);
end
$$;

-- Store what has waited for a project, of one resource that has got one: at most p_limit events, and of
-- those only what came in the last 14 days. Answers how many it took; null when nothing is to be done,
-- in the project or, without one, anywhere.
create or replace function pull_events(p_project_id uuid, p_limit int) returns int
language plpgsql as $$
declare
  v_resource resources;
  v_events jsonb;
  v_taken int;
begin
  loop
    select * into v_resource
    from resources
    where pulling and project_id = coalesce(p_project_id, project_id)  -- null: it was deleted since
    order by integration_id, id
    limit 1
    for no key update;
    exit when found;  -- not: somebody else may have ended the one that was next
    perform from resources where pulling and project_id = coalesce(p_project_id, project_id);
    if not found then
      return null;
    end if;
  end loop;
  with taken as (
    delete from untracked_events
    where id in (
      select id from untracked_events
      where integration_id = v_resource.integration_id and resource_id = v_resource.id
      order by id limit p_limit)
    returning id, event, created_at
  )
  select
    count(*), jsonb_agg(event order by id) filter (
      where created_at > baton_now() - interval '14 days')
  into v_taken, v_events
  from taken;
  if v_events is not null then
    perform store_events(
      (select user_id from integrations where id = v_resource.integration_id),
      v_resource.project_id, v_events);
  end if;
  if v_taken < p_limit then
    update resources set pulling = false
    where integration_id = v_resource.integration_id and id = v_resource.id;
  end if;
  return v_taken;
end
$$;

-- The resources of a project are these from now on, three arrays with what each is called by the
-- caller; the third may be null. Those that it had and that are not among them have no project, and
-- what they send from now on waits. BT404, BT403, BT400; the message names the element.
create or replace function set_resources(
  p_user_id uuid, p_project_id uuid, p_integration_ids uuid[], p_ids text[], p_sources text[]
) returns void
language plpgsql as $$
declare
  v_role text := project_role(p_user_id, p_project_id);
  v_asked record;
  v_integration integrations;
begin
  if v_role is null then
    perform assert_project(p_user_id, p_project_id);
  elsif v_role = 'member' then
    raise 'Only an owner or admin of the project may say which resources it has.'
      using errcode = 'BT403';
  end if;
  for v_asked in
    select
      a.integration_id, a.id, a.source, format('resources[%s]', a.n - 1) as field,
      r.id is not null as known, r.project_id is not distinct from p_project_id as unchanged
    from unnest(p_integration_ids, p_ids, p_sources)
      with ordinality a (integration_id, id, source, n)
    left join resources r on r.integration_id = a.integration_id and r.id = a.id
    order by a.n
  loop
    continue when v_asked.known and v_asked.unchanged;  -- as it is, whoever had it that way
    perform assert_integration_admin(
      integration_role(p_user_id, v_asked.integration_id), v_asked.field || '.integration_id');
    select * into v_integration from integrations where id = v_asked.integration_id;
    if v_asked.source <> v_integration.source then
      raise '%.source: the integration is of the source %.', v_asked.field, v_integration.source
        using errcode = 'BT404';
    end if;
    if not v_asked.known then
      raise '%.resource_id: the integration has no such resource; it has one from its first event on.',
        v_asked.field using errcode = 'BT404';
    end if;
    perform assert_reach(
      v_integration.user_id, v_integration.organization_id, p_project_id,
      v_asked.field || '.integration_id');
  end loop;

  -- All rows in one order, those that go and those that come, before any is changed.
  perform from resources r
  where r.project_id = p_project_id or exists (
    select from unnest(p_integration_ids, p_ids) as a (integration_id, id)
    where a.integration_id = r.integration_id and a.id = r.id)
  order by r.integration_id, r.id
  for no key update;
  update resources r
  set project_id = null, pulling = false
  where r.project_id = p_project_id and not exists (
    select from unnest(p_integration_ids, p_ids) as a (integration_id, id)
    where a.integration_id = r.integration_id and a.id = r.id);
  perform move_resources(p_integration_ids, p_ids, p_project_id);
end
$$;

-- --- Restored copies ----------------------------------------------------------------------
--
-- A restored dump holds the jobs and the messages of a database that may still be there and run and
-- send them itself. So a database knows itself, and one that finds itself to be another does nothing
-- of its own accord: no job is claimed, no webhook sent, nothing swept, until an operator says that it
-- is the one that goes on. Requests are accepted meanwhile, and their jobs wait.

create table if not exists installation (
  one boolean primary key default true check (one),  -- row
  identity text not null,  -- of the database that may work: database_identity() of a copy differs
  reason text,  -- why an operator holds it
  held_since timestamptz,  -- null: no operator does
  constraint installation_held check ((reason is null) = (held_since is null))
);

-- The cluster's system identifier and the database's oid. Neither is in a dump, both are the same on a
-- standby, after a failover and in a copy of the files. Where a provider of PostgreSQL allows no look
-- at the first, the oid has to do: that is what a new cluster may hand out a second time. It is looked
-- at as baton_migrate whoever asks, so that one who may see more does not see another database; hence
-- the row is written when that owns this function, below.
create or replace function database_identity() returns text
language plpgsql stable security definer set search_path = public, pg_temp as $$
declare
  v_system text := '?';
begin
  if has_function_privilege('pg_control_system()', 'execute') then
    v_system := (select system_identifier from pg_control_system());
  end if;
  return v_system || '/' || (select oid from pg_database where datname = current_database());
end
$$;

-- Why this database has to stand still, in one sentence; null: it does not have to. Reads a page and
-- a file of the server, so it can be asked whenever something is claimed.
create or replace function hold_reason() returns text
language sql stable security definer set search_path = public, pg_temp as $$
  select coalesce(i.reason, case
    when i.identity <> database_identity() then 'This database is a restored copy of another one.'
  end)
  from installation i
$$;

-- --- Jobs ---------------------------------------------------------------------------------

create table if not exists jobs (
  id uuid primary key default uuidv7(),
  user_id uuid not null references users,
  project_id uuid not null references projects on delete cascade,
  kind text not null references flows,
  input jsonb not null,  -- {"sources", "filters", "until", "options"}: the scope as submitted
  credits int not null check (credits >= 0),
  status text not null default 'pending'
    check (status in ('pending', 'processing', 'completed', 'failed')),
  outcome text check (outcome in ('succeeded', 'failed', 'cancelled', 'timed_out', 'expired')),
  attempt int not null default 0,  -- how many attempts have started
  lease_token uuid,  -- of the current attempt, or of the one that ended the job: the fence
  crashes int not null default 0,  -- attempts whose worker died
  releases int not null default 0,  -- attempts that were given back; they count for nothing
  provider_errors int not null default 0,  -- attempts that ended in a retryable provider error
  ticket_id bigint,  -- the latest ticket; procrastinate_jobs.id
  rev bigint not null default 1,  -- grows with every change that a client can see
  result_kind text check (result_kind in ('handoff', 'insight')),
  result_id uuid,
  error text,
  error_code text check (error_code in (
    'plan_violation', 'quota_exceeded', 'generation_failed', 'no_result', 'cancelled', 'timeout',
    'worker_lost')),
  error_meta jsonb not null default '{}',
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now(),
  started_at timestamptz,
  completed_at timestamptz,
  -- A day old, an answer is of no use to the one who asked; until then an outage is waited out.
  deadline_at timestamptz not null default baton_now() + interval '24 hours',
  constraint jobs_ended check ((status in ('completed', 'failed')) = (completed_at is not null)),
  constraint jobs_outcome check ((status in ('completed', 'failed')) = (outcome is not null)),
  constraint jobs_succeeded check ((status = 'completed') = (outcome is not distinct from 'succeeded')),
  constraint jobs_result check (
    (status = 'completed') = (result_id is not null)
    and (result_id is null) = (result_kind is null)),
  constraint jobs_error check (
    (status = 'failed') = (error_code is not null) and (error_code is null) = (error is null)),
  constraint jobs_running check (status <> 'processing' or lease_token is not null)
) with (fillfactor = 80);

-- Since version 2.
alter table jobs
  add column if not exists retry_of uuid,  -- the failed job that this one tries again
  add column if not exists fingerprint bigint,  -- of kind and input: the same request, asked twice
  add column if not exists priority text not null default 'normal',
  add column if not exists metadata jsonb not null default '{}',  -- the client's own pairs
  add column if not exists webhook_url text,
  add column if not exists start_deadline_at timestamptz,  -- started later it is of no use
  add column if not exists progress jsonb,  -- {"value", "step", "message"} of the running attempt
  add column if not exists usage jsonb,  -- tokens and credits of a completed job
  add column if not exists from_grants int not null default 0;  -- how many credits grants pay
do $$
begin
  if not exists (
    select from pg_constraint
    where conrelid = 'jobs'::regclass and conname = 'jobs_priority_check') then
    alter table jobs add constraint jobs_priority_check
      check (priority in ('low', 'normal', 'high')) not valid;
  end if;
  if not exists (
    select from pg_constraint
    where conrelid = 'jobs'::regclass and conname = 'jobs_from_grants_check') then
    alter table jobs add constraint jobs_from_grants_check check (from_grants >= 0) not valid;
  end if;
end
$$;
-- later
alter table jobs validate constraint jobs_priority_check;
-- later
alter table jobs validate constraint jobs_from_grants_check;

-- Since version 3.
alter table jobs
  add column if not exists front boolean not null default false,  -- an operator put it first
  add column if not exists data_removed boolean not null default false;  -- its artifact is gone
create index if not exists jobs_retry_of on jobs (retry_of) where retry_of is not null;
-- What a job came from, for logs and traces. store_job checks them: a CHECK would read all jobs under
-- a lock.
alter table jobs
  add column if not exists request_id text,  -- of the request, as the log has it
  add column if not exists traceparent text;  -- W3C Trace Context: what an attempt is traced as part of

-- What is not over yet, however many jobs are: what the sweep and the reconciliation look at.
-- What operators count in it is included; none of that changes unless the status does.
create index if not exists jobs_unfinished_by_deadline on jobs (deadline_at)
  include (kind, priority, status, created_at, started_at, id, project_id, credits, from_grants)
  where status in ('pending', 'processing');
-- later: that of version 2, without what is included
drop index if exists jobs_unfinished;
create index if not exists jobs_start_deadline on jobs (start_deadline_at)
  where status = 'pending' and start_deadline_at is not null and started_at is null;
-- Of one project: what is asked for already, and what stands before a new job.
create index if not exists jobs_unfinished_by_project on jobs (project_id, created_at, id)
  where status in ('pending', 'processing');
create index if not exists jobs_recent on jobs (project_id, created_at desc, id desc);
-- The few that a list asks for by outcome among the many that went well.
create index if not exists jobs_failed on jobs (project_id, created_at desc, id desc)
  where status = 'failed';
create index if not exists jobs_metadata on jobs using gin (metadata jsonb_path_ops)
  where metadata <> '{}';
-- How long jobs of a kind take: the estimate reads the last few.
create index if not exists jobs_pace on jobs (kind, completed_at desc) where status = 'completed';
-- What has failed lately, by kind; one that has not failed costs nothing here.
create index if not exists jobs_failures on jobs (kind, completed_at desc) include (error_code)
  where status = 'failed';

-- A key belongs to a user and a route, and is kept for at least a day. The row is written before its
-- job, so that the same request, sent twice at once, waits here and then finds the first one's job.
create table if not exists idempotency_keys (
  user_id uuid not null references users on delete cascade,
  route text not null,
  key text not null check (length(key) between 1 and 255),
  fingerprint bytea not null check (octet_length(fingerprint) = 32),  -- SHA-256 of the request
  job_id uuid not null,  -- also of a deleted job: a late repeat must not make and charge another one
  created_at timestamptz not null default baton_now(),
  primary key (user_id, route, key)
);
alter table idempotency_keys drop constraint if exists idempotency_keys_job_id_fkey;  -- once had
create index if not exists idempotency_keys_job on idempotency_keys (job_id);
create index if not exists idempotency_keys_age on idempotency_keys (created_at);

create table if not exists deleted_jobs (
  id uuid primary key,
  project_id uuid not null references projects on delete cascade,
  deleted_at timestamptz not null default baton_now()
);
create index if not exists deleted_jobs_age on deleted_jobs (deleted_at);

-- How long what is over is kept: a job or a delivery from its end, everything else from when it was
-- stored. Operators change it with ops.set_retention; see the section Retention for who applies it.
create table if not exists retention (
  name text primary key,  -- the table
  keep interval,  -- null: for ever
  least interval not null,  -- what clients have been promised, or what Baton itself looks back at
  due_at timestamptz not null default baton_now(),  -- of the next batch
  rest_until timestamptz,  -- no batch of any table before that: the price of the latest one
  reached text,  -- up to which key this pass has come; null: it has not begun
  done_at timestamptz not null default baton_now(),  -- then nothing was there that is too old
  removed bigint not null default 0,  -- rows, so far
  error text,  -- why the latest batch failed; null: it did not
  constraint retention_keep check (keep >= least)
);
-- What a team brought in or had made for it stays until somebody says otherwise; so do the charges.
-- Of the rest: thirteen months, so that a month can be compared with the same one a year ago, or as
-- long as somebody may come back to it.
insert into retention (name, keep, least) values
  ('jobs', '30 days', '1 day'),
  ('handoffs', null, '1 day'),
  ('insights', null, '1 day'),
  ('events', null, '14 days'),  -- that far a handoff may look back
  ('provider_calls', '400 days', '62 days'),  -- this month and the last
  ('charges', null, '62 days'),
  ('webhook_deliveries', '30 days', '1 day'),
  ('deleted_jobs', '30 days', '1 day'),
  ('idempotency_keys', '2 days', '2 days'),
  ('audit', '400 days', '90 days'),
  ('hook_deliveries', '30 days', '7 days'),  -- so long a source may send something again
  ('untracked_events', '30 days', '14 days'),  -- as for events
  ('search_entries', '15 days', '15 days')  -- a day more than a question looks back
on conflict do nothing;

-- What a client that follows a job is told, in order and without gaps: two changes of a job wait for
-- each other's commit, so whoever has read up to a seq has missed nothing before it.
create table if not exists job_events (
  job_id uuid not null references jobs on delete cascade,
  seq bigint not null,  -- jobs.rev after the change
  type text not null,  -- job. and the new status, or job.progress
  at timestamptz not null,
  data jsonb not null,
  primary key (job_id, seq)
);

-- The one writer of the log, so that no code path can forget it. What changes after the end of a
-- job, such as the loss of its artifact, is not part of its course.
create or replace function log_job_event() returns trigger
language plpgsql as $$
begin
  if tg_op = 'UPDATE' and old.status in ('completed', 'failed') then
    return null;
  end if;
  insert into job_events (job_id, seq, type, at, data)
  values (
    new.id, new.rev,
    'job.' || case when new.status = old.status then 'progress' else new.status end,
    baton_now(),
    jsonb_build_object(
      'status', new.status, 'attempt', new.attempt, 'outcome', new.outcome,
      'error_code', new.error_code, 'error', new.error, 'progress', new.progress));
  return null;
end
$$;
create or replace trigger jobs_log after insert or update of rev on jobs for each row
  execute function log_job_event();

create table if not exists leases (
  job_id uuid primary key references jobs on delete cascade,
  lease_token uuid not null,
  worker text not null,
  expires_at timestamptz not null
) with (fillfactor = 50);

create index if not exists leases_expiry on leases (expires_at);

-- Since version 3.
alter table leases add column if not exists claimed_at timestamptz not null default baton_now();

create table if not exists job_due (
  job_id uuid primary key references jobs on delete cascade,
  not_before timestamptz not null
);
create index if not exists job_due_when on job_due (not_before);

-- Since version 3. A job that is held back has no time: not_before is infinity. The jobs of a line
-- are let go by rank and age. Of a project with a limit one that has been let go keeps its row until
-- it is claimed (admitted): the ticket counts as the attempt that it will be.
alter table job_due
  add column if not exists reason text not null default 'retry'
    check (reason in ('retry', 'paused', 'concurrency', 'admitted')),
  add column if not exists line text,  -- the kind that is paused, or the project
  add column if not exists rank int not null default 0,  -- the priority of its ticket
  add column if not exists created_at timestamptz;  -- of the job
create index if not exists job_due_line on job_due (line, reason, rank desc, created_at, job_id)
  where line is not null;

create table if not exists pauses (
  kind text references flows,  -- null: all
  reason text,
  created_at timestamptz not null default baton_now()
);
create unique index if not exists pauses_kind on pauses (kind) nulls not distinct;

create table if not exists project_concurrency (
  project_id uuid primary key references projects on delete cascade,
  concurrency int check (concurrency between 0 and 10000)  -- null: no limit any more
);

-- Procrastinate announces each insert inside the inserting transaction, and a transaction that
-- notified holds a lock of the whole cluster while it commits. Baton announces after the commit,
-- at most every 20 ms (app/queue.py). The announcement of aborts stays.
drop trigger if exists procrastinate_jobs_notify_queue_job_inserted_v1 on procrastinate_jobs;

-- Tickets come and go by the thousand; at the default of 20 % the dead ones would slow the claim.
alter table procrastinate_jobs set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0,
  autovacuum_analyze_threshold = 1000);
alter table procrastinate_events set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
  autovacuum_vacuum_cost_delay = 0);

-- Procrastinate's log of a ticket: two rows, written and deleted with it, which nobody reads;
-- job_events says more and stays. The triggers are switched off and not dropped, so that a migration
-- of Procrastinate finds them.
do $$
declare
  v_trigger text;
begin
  for v_trigger in
    select tgname from pg_trigger
    where tgrelid = 'procrastinate_jobs'::regclass and not tgisinternal and tgenabled <> 'D'
      and tgname ~ '^procrastinate_trigger_.*_events_'
  loop
    execute format('alter table procrastinate_jobs disable trigger %I', v_trigger);
  end loop;
end
$$;

-- A ticket for a job, for one generic task: an API and a worker of different versions understand
-- each other. Queues and task are also named in app/queue.py. Workers of version 3 look at the queue
-- jobs only: what they cannot make waits in another one for those that can.
create or replace function rank_of(p_priority text) returns int
language sql immutable as $$
  select case p_priority when 'front' then 100 when 'high' then 10 when 'low' then -10 else 0 end
$$;

drop function if exists defer_ticket(uuid);  -- of version 1
drop function if exists defer_ticket(uuid, text);  -- of version 3
create or replace function defer_ticket(
  p_job_id uuid, p_priority text default 'normal', p_kind text default 'handoff'
) returns bigint
language sql as $$
  select (procrastinate_defer_jobs_v1(array[
    row(case when p_kind in ('question', 'digest') then 'jobs_4' else 'jobs' end,
        'baton.generate', rank_of(p_priority), null, null,
        jsonb_build_object('job_id', p_job_id), null)
      ::procrastinate_job_to_defer_v1]))[1]
$$;

-- Why a job may not have a ticket just so: paused, or concurrency when its project has a limit.
-- Null: it may.
create or replace function waits_for(p_kind text, p_project_id uuid) returns text
language plpgsql stable as $$
begin
  return case
    when exists (select from pauses where kind is null or kind = p_kind) then 'paused'
    when exists (
      select from project_concurrency
      where project_id = p_project_id and concurrency is not null) then 'concurrency'
  end;
end
$$;

-- Hold a pending job back, whatever it has waited for until now. Called under the job's lock.
create or replace function put_in_line(p_job jobs, p_reason text) returns void
language plpgsql as $$
begin
  delete from procrastinate_jobs where id = p_job.ticket_id;
  insert into job_due (job_id, not_before, reason, line, rank, created_at)
  values (
    p_job.id, 'infinity', p_reason,
    case p_reason when 'paused' then p_job.kind else p_job.project_id::text end,
    rank_of(case when p_job.front then 'front' else p_job.priority end), p_job.created_at)
  on conflict (job_id) do update
  set not_before = excluded.not_before, reason = excluded.reason, line = excluded.line,
    rank = excluded.rank, created_at = excluded.created_at;
end
$$;

-- Whoever decides how many attempts a project with a limit has takes turns, until its transaction
-- ends; nobody else pays for that. Who holds the lock waits for no job, so jobs may be locked before.
create or replace function lock_concurrency(p_project_id uuid) returns void
language sql as $$
  select pg_advisory_xact_lock(hashtextextended('baton concurrency ' || p_project_id, 0))
$$;

-- Few attempts run, many jobs wait, so it is the attempts that are looked at.
create or replace function count_attempts(p_project_id uuid) returns bigint
language plpgsql as $$
begin
  return (
    select count(*) from leases l
    where (select j.project_id from jobs j where j.id = l.job_id) = p_project_id);
end
$$;

-- Give tickets to the first jobs in the line of a project: as many as its limit has room for, all
-- when it has none any more, but not more than p_limit. Answers how many. Called under
-- lock_concurrency. A job that somebody has locked is left out, and found by the next wake_held.
create or replace function let_go(p_project_id uuid, p_limit int) returns int
language plpgsql as $$
declare
  v_concurrency int := (
    select concurrency from project_concurrency where project_id = p_project_id);
  v_line text := p_project_id::text;
  v_room int := p_limit;
  v_job jobs;
  v_count int := 0;
begin
  if v_concurrency is not null then
    v_room := least(p_limit, v_concurrency - count_attempts(p_project_id) - (
      select count(*) from job_due where line = v_line and reason = 'admitted'));
  end if;
  if v_room <= 0 then
    return 0;
  end if;
  for v_job in
    select j.*
    from job_due d
    join jobs j on j.id = d.job_id
    where d.line = v_line and d.reason = 'concurrency' and j.status = 'pending'
    order by d.rank desc, d.created_at, d.job_id
    limit v_room
    for update of j skip locked
  loop
    v_count := v_count + 1;
    if waits_for(v_job.kind, p_project_id) = 'paused' then
      perform put_in_line(v_job, 'paused');
      continue;
    end if;
    update jobs
    set ticket_id = defer_ticket(id, case when front then 'front' else priority end, kind)
    where id = v_job.id;
    if v_concurrency is null then
      delete from job_due where job_id = v_job.id;
    else
      update job_due set reason = 'admitted' where job_id = v_job.id;
    end if;
  end loop;
  return v_count;
end
$$;

-- The end of an attempt, however it ended, makes room for the next one of its project.
create or replace function lease_ended() returns trigger
language plpgsql as $$
declare
  v_project_id uuid;
begin
  if exists (select from project_concurrency) then
    select c.project_id into v_project_id
    from jobs j
    join project_concurrency c on c.project_id = j.project_id
    where j.id = old.job_id;
    if found then
      perform lock_concurrency(v_project_id);
      perform let_go(v_project_id, 100);
    end if;
  end if;
  return null;
end
$$;
create or replace trigger leases_ended after delete on leases for each row
  execute function lease_ended();

-- Whether a job that somebody holds a ticket for may run now; if not, it is in line from here on.
create or replace function may_run(p_job_id uuid) returns boolean
language plpgsql as $$
declare
  v_job jobs;
  v_reason text;
  v_concurrency int;
begin
  select * into v_job from jobs where id = p_job_id and status = 'pending' for update;
  if not found then
    return false;
  end if;
  v_reason := waits_for(v_job.kind, v_job.project_id);
  if v_reason = 'concurrency' then
    perform lock_concurrency(v_job.project_id);
    select concurrency into v_concurrency
    from project_concurrency where project_id = v_job.project_id;
    if coalesce(count_attempts(v_job.project_id) < v_concurrency, true) then
      return true;
    end if;
  elsif v_reason is null then
    return true;
  end if;
  perform put_in_line(v_job, v_reason);
  return false;
end
$$;

-- The last line of defence for "a finished job never changes": no code path can get round it.
create or replace function refuse_change_of_ended_job() returns trigger
language plpgsql as $$
begin
  raise 'Job % is % and stays so.', old.id, old.status using errcode = 'BT409';
end
$$;
create or replace trigger jobs_ended_is_final before update on jobs for each row
  when (old.status in ('completed', 'failed') and (
    new.status is distinct from old.status or new.result_id is distinct from old.result_id
    or new.error_code is distinct from old.error_code))
  execute function refuse_change_of_ended_job();

-- The first fault of a scope as a sentence that names the field, or null. Unknown *values* of a
-- filter are no fault: they match nothing.
drop function if exists scope_fault(text, text[], jsonb);  -- of version 1
create or replace function scope_fault(
  p_project_id uuid, p_kind text, p_sources text[], p_filters jsonb
) returns text
language plpgsql stable as $$
declare
  v_field text := case p_kind when 'release_notes' then 'source' else 'sources' end;
  v_fault text;
begin
  select case
    when s.name is null then format('filters.%s: there is no source named "%s".', f.key, f.key)
    when f.value ? 'branches' and not s.has_branches
      then format('filters.%s.branches: %s has no branches.', f.key, s.label)
    when f.value ? 'priorities' and not s.has_priorities
      then format('filters.%s.priorities: %s has no priorities.', f.key, s.label)
  end into v_fault
  from jsonb_each(coalesce(p_filters, '{}')) f
  left join sources s on s.name = f.key
  order by 1
  limit 1;
  if v_fault is not null then
    return v_fault;
  end if;

  select format('%s: there is no source named "%s".', v_field, name) into v_fault
  from unnest(p_sources) as name
  where name not in (select s.name from sources s)
  limit 1;
  if found then
    return v_fault;
  end if;

  -- Without sources all that the project has are meant; one without events is told when it runs.
  if p_kind in ('architecture_insight', 'release_notes') and not exists (
    select from sources s where s.has_branches and case
      when p_sources is not null then s.name = any (p_sources)
      else exists (
        select from event_facets f where f.project_id = p_project_id and f.source = s.name) end)
    and (p_sources is not null
      or exists (select from event_facets f where f.project_id = p_project_id)) then
    return format('%s: this artifact needs a code source such as github in its scope.', v_field);
  end if;
  return null;
end
$$;

-- Save what a request of the project means that names neither sources nor filters; two nulls: all.
-- BT404, BT403, BT400.
create or replace function set_project_scope(
  p_user_id uuid, p_project_id uuid, p_sources text[], p_filters jsonb
) returns jsonb
language plpgsql as $$
declare
  v_role text := project_role(p_user_id, p_project_id);
  v_fault text;
  v_scope jsonb;
begin
  if v_role is null then
    perform assert_project(p_user_id, p_project_id);
  elsif v_role = 'member' then
    raise 'Only an owner or admin of the project may set its scope.' using errcode = 'BT403';
  end if;
  v_fault := scope_fault(p_project_id, 'handoff', p_sources, p_filters);
  if v_fault is not null then
    raise '%', v_fault using errcode = 'BT400';
  end if;
  if p_sources is not null or p_filters is not null then
    v_scope := jsonb_build_object('sources', p_sources, 'filters', p_filters);
  end if;
  update projects set scope = v_scope, updated_at = baton_now() where id = p_project_id;
  return v_scope;
end
$$;

-- The job that a client sees: the fields of the contract, then what was added to them.
--
-- progress   of the running attempt; {"value": 0..1 or null, "step", "message"}
-- queue      how many tickets are served before this one, counted to 1000, how many unfinished jobs
--            of the same project are older, and whether an operator lets none of them start; null
--            unless the job waits for a worker
-- timings    milliseconds: waiting, then running (from the first attempt), then both
-- rev        what has changed since; the ETag
-- expires_at when an ended job is removed; data_removed: its artifact has been already
create or replace view job_objects as
select
  j.id, j.project_id, j.kind, j.status, j.result_kind, j.result_id, j.error, j.error_code,
  j.error_meta, j.created_at, j.updated_at,
  j.status in ('completed', 'failed') as done,
  j.outcome, j.attempt, j.retry_of, j.started_at, j.completed_at,
  case j.outcome when 'cancelled' then j.completed_at end as cancel_requested_at,
  j.start_deadline_at, j.deadline_at,
  coalesce(j.progress, jsonb_build_object(
    'value', case j.status when 'completed' then 1 when 'pending' then 0 end,
    'step', case j.status when 'pending' then 'queued' when 'processing' then 'starting'
      else j.status end,
    'message', null)) as progress,
  case when t.id is not null or d.reason <> 'retry' then jsonb_build_object(
    'position', ahead.count + 1, 'capped', ahead.count >= 1000,
    'ahead_in_project', older.count,
    'paused', exists (select from pauses p where p.kind is null or p.kind = j.kind)
      or exists (
        select from project_concurrency c where c.project_id = j.project_id and c.concurrency = 0)
      or hold_reason() is not null) end as queue,
  jsonb_build_object(
    'queue_ms', milliseconds(j.created_at, j.started_at),
    'run_ms', milliseconds(j.started_at, j.completed_at),
    'total_ms', milliseconds(j.created_at, j.completed_at)) as timings,
  coalesce(j.usage, '{"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "credits": 0}')
    as usage,
  j.priority, j.metadata,
  j.status = 'processing' and coalesce(l.expires_at < baton_now(), true) as recovering,
  j.rev,
  nullif(d.not_before, 'infinity') as not_before,  -- of a job that waits for its next try
  baton_now() as read_at,
  j.data_removed,
  j.completed_at + (select r.keep from retention r where r.name = 'jobs') as expires_at
from jobs j
left join leases l on j.status = 'processing' and l.job_id = j.id
left join job_due d on j.status = 'pending' and d.job_id = j.id
left join procrastinate_jobs t on j.status = 'pending' and t.id = j.ticket_id and t.status = 'todo'
-- "waits" inside: as a condition of the join it would be looked at after the counting. A job in line
-- counts as the last of its priority.
left join lateral (
  select
    coalesce(t.priority, d.rank) as priority, coalesce(t.id, 9223372036854775807) as id,
    t.id is not null or coalesce(d.reason <> 'retry', false) as waits
) place on true
left join lateral (
  select count(*)
  from (
    (select 1 from procrastinate_jobs o
     where place.waits and o.status = 'todo' and o.priority = place.priority and o.id < place.id
     limit 1000)
    union all
    (select 1 from procrastinate_jobs o
     where place.waits and o.status = 'todo' and o.priority > place.priority limit 1000)
    limit 1000
  ) counted
) ahead on true
left join lateral (
  select count(*)
  from (
    select 1 from jobs o
    where place.waits and o.project_id = j.project_id and o.status in ('pending', 'processing')
      and (o.created_at, o.id) < (j.created_at, j.id)
    limit 1000
  ) counted
) older on true;

-- The id of the job that this key of this user stands for already, or null: then p_job_id is now
-- what it stands for. Two at once: the second waits for the first to commit.
create or replace function same_request(
  p_user_id uuid, p_route text, p_key text, p_fingerprint bytea, p_job_id uuid
) returns uuid
language plpgsql as $$
declare
  v_known idempotency_keys;
begin
  insert into idempotency_keys (user_id, route, key, fingerprint, job_id)
  values (p_user_id, p_route, p_key, p_fingerprint, p_job_id)
  on conflict (user_id, route, key) do nothing;
  if found then
    return null;
  end if;
  select * into strict v_known
  from idempotency_keys
  where user_id = p_user_id and route = p_route and key = p_key;
  if v_known.fingerprint <> p_fingerprint then
    raise 'Idempotency-Key: this key was used for another request; use a new key for a new request.'
      using errcode = 'BT422';
  end if;
  return v_known.job_id;
end
$$;

-- The job that a key stands for; BT411 when it has been deleted, for as long as the key is kept.
create or replace function job_of_key(p_job_id uuid) returns job_objects
language plpgsql stable as $$
declare
  v_job job_objects;
begin
  select * into v_job from job_objects where id = p_job_id;
  if not found then
    raise 'Idempotency-Key: the job of this key has been deleted; use a new key for a new request.'
      using errcode = 'BT411';
  end if;
  return v_job;
end
$$;

-- Answers BT429 when the project has as many pending jobs as it may; 0: no limit. With that many in
-- reach, submits take turns, so that the limit is exact: more than a hundred at once do not come
-- from anywhere, PostgreSQL takes no more connections unless told to.
create or replace function assert_room(p_project_id uuid, p_limit int) returns void
language plpgsql as $$
declare
  v_pending int;
begin
  if p_limit = 0 then
    return;
  end if;
  for turn in 1 .. 2 loop
    select count(*) into v_pending
    from (
      select from jobs
      where project_id = p_project_id and status = 'pending'
      limit p_limit
    ) pending;
    if v_pending >= p_limit then
      raise 'This project has % pending jobs, as many as it may. Try again when some have ended.',
        v_pending using errcode = 'BT429';
    end if;
    exit when v_pending < p_limit - 100;
    if turn = 1 then
      perform pg_advisory_xact_lock(hashtextextended('baton room ' || p_project_id, 0));
    end if;
  end loop;
end
$$;

-- Store a pending job and its ticket, or in line for one, or a failed job when the plan of the project's owner does not
-- allow it. p_job is what the client said of the job itself: {"priority", "metadata", "webhook_url",
-- "start_timeout_s", "timeout_s"}, each optional; and what the API says of the request, as no client
-- can: {"request_id", "traceparent"}.
create or replace function store_job(
  p_id uuid, p_user_id uuid, p_project_id uuid, p_kind text, p_input jsonb, p_job jsonb,
  p_retry_of uuid
) returns void
language plpgsql as $$
declare
  v_verdict record := assess(p_project_id, p_kind);
  v_refused boolean := v_verdict.error_code is not null;
  v_reason text := waits_for(p_kind, p_project_id);
  v_job jobs;
begin
  insert into jobs (
    id, ticket_id, user_id, project_id, kind, input, fingerprint, credits, from_grants, status,
    outcome, error_code, error, error_meta, completed_at, priority, metadata, webhook_url,
    start_deadline_at, deadline_at, retry_of, request_id, traceparent)
  values (
    p_id,
    case when not v_refused and v_reason is null
      then defer_ticket(p_id, p_job ->> 'priority', p_kind) end,
    p_user_id, p_project_id, p_kind, p_input,
    hashtextextended(p_kind || p_input::text, 0),
    v_verdict.credits,
    v_verdict.from_grants,
    case when v_refused then 'failed' else 'pending' end,
    case when v_refused then 'failed' end,
    v_verdict.error_code, v_verdict.error, v_verdict.error_meta,
    case when v_refused then baton_now() end,
    coalesce(p_job ->> 'priority', 'normal'),
    coalesce(p_job -> 'metadata', '{}'),
    p_job ->> 'webhook_url',
    baton_now() + (p_job ->> 'start_timeout_s')::float8 * interval '1 second',
    -- A day old, an answer is of no use to the one who asked; until then an outage is waited out.
    baton_now() + coalesce((p_job ->> 'timeout_s')::float8, 86400) * interval '1 second',
    p_retry_of,
    left(p_job ->> 'request_id', 128),
    substring(p_job ->> 'traceparent' from '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$'));
  if v_reason is null or v_refused then
    return;
  end if;
  select * into strict v_job from jobs where id = p_id;
  perform put_in_line(v_job, v_reason);
  if v_reason = 'concurrency' then
    perform lock_concurrency(p_project_id);
    perform let_go(p_project_id, 100);
  end if;
end
$$;

-- The same request once more, as a new job of p_user_id; p_request is {"request_id", "traceparent"}.
create or replace function store_retry(
  p_id uuid, p_user_id uuid, p_job jobs, p_request jsonb default '{}'
) returns void
language plpgsql as $$
begin
  perform store_job(
    p_id, p_user_id, p_job.project_id, p_job.kind, p_job.input,
    jsonb_strip_nulls(jsonb_build_object(
      'priority', p_job.priority, 'metadata', p_job.metadata, 'webhook_url', p_job.webhook_url,
      'start_timeout_s', extract(epoch from p_job.start_deadline_at - p_job.created_at),
      'timeout_s', extract(epoch from p_job.deadline_at - p_job.created_at)))
      || jsonb_build_object(
        'request_id', p_request -> 'request_id', 'traceparent', p_request -> 'traceparent'),
    p_job.id);
end
$$;

-- Store a request as a pending job, and its ticket; or answer the job that it has made already
-- (replayed: the same idempotency key; deduplicated: asked to join a running job of the same
-- request). Without sources and filters the project's saved scope is taken, and filters alone name
-- their sources.
drop function if exists submit_job(uuid, uuid, text, text[], jsonb, timestamptz, jsonb);
drop function if exists submit_job(
  uuid, uuid, text, text[], jsonb, timestamptz, jsonb, jsonb, text, bytea);
create or replace function submit_job(
  p_user_id uuid, p_project_id uuid, p_kind text, p_sources text[], p_filters jsonb,
  p_until timestamptz, p_options jsonb, p_job jsonb default '{}', p_key text default null,
  p_fingerprint bytea default null, p_pending_limit int default 0, out job job_objects,
  out replayed boolean, out deduplicated boolean
) language plpgsql as $$
declare
  v_id uuid := uuidv7();
  v_known uuid;
  v_saved jsonb;
  v_fault text;
  v_input jsonb;
begin
  perform assert_project(p_user_id, p_project_id);
  replayed := false;
  deduplicated := false;

  if p_key is not null then
    v_known := same_request(p_user_id, p_kind, p_key, p_fingerprint, v_id);
    if v_known is not null then
      replayed := true;
      job := job_of_key(v_known);
      return;
    end if;
  end if;

  if p_sources is null and p_filters is null then
    select scope into v_saved from projects where id = p_project_id;
    p_filters := nullif(v_saved -> 'filters', 'null');
    if jsonb_typeof(v_saved -> 'sources') = 'array' then
      p_sources := array(select jsonb_array_elements_text(v_saved -> 'sources'));
    end if;
  end if;
  if p_sources is null and p_filters <> '{}' then
    p_sources := array(select jsonb_object_keys(p_filters));
  end if;
  if p_sources is not null then  -- a set: another order is not another scope
    p_sources := array(select distinct s from unnest(p_sources) s order by s);
  end if;

  v_fault := scope_fault(p_project_id, p_kind, p_sources, p_filters);
  if v_fault is not null then
    raise '%', v_fault using errcode = 'BT400';
  end if;
  v_input := jsonb_build_object(
    'sources', p_sources, 'filters', coalesce(p_filters, '{}'), 'until', p_until,
    'options', p_options);

  if p_job ->> 'dedupe' = 'in_flight' then
    -- Two at once: the second waits for the first to commit.
    perform pg_advisory_xact_lock(hashtextextended(
      p_project_id::text || p_kind || v_input::text, 0));
    select id into v_known
    from jobs
    where project_id = p_project_id and status in ('pending', 'processing')
      and fingerprint = hashtextextended(p_kind || v_input::text, 0)
      and kind = p_kind and input = v_input
      -- One that would tell somebody else how it ends is another request.
      and (webhook_url is not distinct from p_job ->> 'webhook_url'
        or p_job ->> 'webhook_url' is null)
    order by created_at, id
    limit 1;
    if found then
      update idempotency_keys k set job_id = v_known where k.job_id = v_id;
      deduplicated := true;
      select o.* into job from job_objects o where o.id = v_known;
      return;
    end if;
  end if;

  perform assert_room(p_project_id, p_pending_limit);
  perform store_job(v_id, p_user_id, p_project_id, p_kind, v_input, p_job, null);
  select o.* into strict job from job_objects o where o.id = v_id;
end
$$;

-- The job, locked, if the user may see it. BT404 or BT411 otherwise.
create or replace function lock_visible_job(p_user_id uuid, p_job_id uuid) returns jobs
language plpgsql as $$
declare
  v_job jobs;
begin
  select j.* into v_job
  from jobs j
  join project_access a on a.project_id = j.project_id and a.user_id = p_user_id
  where j.id = p_job_id
  for update of j;
  if found then
    return v_job;
  end if;
  perform from deleted_jobs d
  join project_access a on a.project_id = d.project_id and a.user_id = p_user_id
  where d.id = p_job_id;
  if found then
    raise 'This job is gone: it has been deleted, or its time was over.' using errcode = 'BT411';
  end if;
  raise 'job_id: no job with this id is visible to this key.' using errcode = 'BT404';
end
$$;

-- End a job that is wanted no more; one that has ended stays as it is. A running attempt loses its
-- lease here and now, so nothing that it does later counts; its ticket is answered, so that the
-- worker can be told to stop it (null: nothing runs).
create or replace function cancel_job(
  p_user_id uuid, p_job_id uuid, out job job_objects, out changed boolean,
  out running_ticket_id bigint
) language plpgsql as $$
declare
  v_job jobs := lock_visible_job(p_user_id, p_job_id);
begin
  changed := v_job.status in ('pending', 'processing');
  if changed then
    perform end_job(
      v_job, null, 'cancelled', 'cancelled', 'Cancelled by the caller.',
      jsonb_build_object('retryable', true, 'attempts', v_job.attempt,
        'stage', case v_job.status when 'pending' then 'queued' else 'generating' end));
  end if;
  if v_job.status = 'processing' then
    running_ticket_id := v_job.ticket_id;
  end if;
  select o.* into strict job from job_objects o where o.id = p_job_id;
end
$$;

-- The same request once more as a new job: of a failed one, because a completed one has its artifact.
-- p_request is {"request_id", "traceparent"} of this request.
drop function if exists retry_job(uuid, uuid, text, bytea);
create or replace function retry_job(
  p_user_id uuid, p_job_id uuid, p_key text, p_fingerprint bytea, p_pending_limit int,
  p_request jsonb, out job job_objects, out replayed boolean
) language plpgsql as $$
declare
  v_job jobs := lock_visible_job(p_user_id, p_job_id);
  v_id uuid := uuidv7();
  v_known uuid;
begin
  replayed := false;
  if p_key is not null then
    v_known := same_request(p_user_id, 'retry', p_key, p_fingerprint, v_id);
    if v_known is not null then
      replayed := true;
      job := job_of_key(v_known);
      return;
    end if;
  end if;
  if v_job.status <> 'failed' then
    raise 'The job is %; only a failed one can be tried again.', v_job.status using errcode = 'BT409';
  end if;
  perform assert_room(v_job.project_id, p_pending_limit);
  perform store_retry(v_id, p_user_id, v_job, p_request);
  select o.* into strict job from job_objects o where o.id = v_id;
end
$$;

drop function if exists retry_job(uuid, uuid, text, bytea, int);  -- of version 2

-- Take an ended job away, with its artifact. What it cost stays in charges.
create or replace function delete_job(p_user_id uuid, p_job_id uuid) returns void
language plpgsql as $$
declare
  v_job jobs := lock_visible_job(p_user_id, p_job_id);
begin
  if v_job.status not in ('completed', 'failed') then
    raise 'The job is %; cancel it first, or wait until it has ended.', v_job.status
      using errcode = 'BT409';
  end if;
  delete from jobs where id = p_job_id;
  delete from handoffs where job_id = p_job_id;
  delete from insights where job_id = p_job_id;
  insert into deleted_jobs (id, project_id) values (p_job_id, v_job.project_id);
end
$$;

-- A worker that holds a ticket takes the job. No row: another ticket won, or the job has ended, or it
-- is past a deadline and the sweep, which is about to say so, has only not come yet; or an operator
-- holds the job back; or the database is held, and the reconciliation makes a new ticket when it is
-- let go.
create or replace function claim_job(
  p_job_id uuid, p_ticket_id bigint, p_worker text, p_lease_seconds double precision
) returns setof jobs
language plpgsql as $$
declare
  v_job jobs;
begin
  if hold_reason() is not null then
    return;
  elsif exists (select from pauses union all select from project_concurrency)
    and not may_run(p_job_id) then
    return;
  end if;
  update jobs
  set
    status = 'processing',
    attempt = attempt + 1,
    lease_token = gen_random_uuid(),
    ticket_id = p_ticket_id,
    progress = null,
    rev = rev + 1,
    started_at = coalesce(started_at, baton_now()),
    updated_at = baton_now()
  where id = p_job_id and status = 'pending' and deadline_at >= baton_now()
    and (started_at is not null or start_deadline_at is null or start_deadline_at >= baton_now())
  returning * into v_job;
  if not found then
    return;
  end if;
  insert into leases (job_id, lease_token, worker, expires_at)
  values (
    v_job.id, v_job.lease_token, p_worker,
    baton_now() + p_lease_seconds * interval '1 second');
  delete from job_due where job_id = v_job.id;  -- a second ticket can come before it is due
  return next v_job;
end
$$;

-- One statement per worker and tick, for all that it runs. Answers the jobs whose lease is still
-- its own; for the others it has to stop, their result would be refused. Not worth waiting for the
-- disk: a renewal lost in a crash of the server is one that came a moment too late. (A SET of the
-- function would have ended before the commit.)
create or replace function renew_leases(
  p_job_ids uuid[], p_lease_tokens uuid[], p_lease_seconds double precision
) returns setof uuid
language sql as $$
  select set_config('synchronous_commit', 'off', true);
  update leases l
  set expires_at = baton_now() + p_lease_seconds * interval '1 second'
  from unnest(p_job_ids, p_lease_tokens) as held (job_id, lease_token)
  where l.job_id = held.job_id and l.lease_token = held.lease_token
  returning l.job_id
$$;

-- What running attempts are at, for all of a worker at once. Answers the jobs that are still its
-- own. Not worth waiting for the disk.
create or replace function report_progress(
  p_job_ids uuid[], p_lease_tokens uuid[], p_progress jsonb[]
) returns setof uuid
language sql as $$
  select set_config('synchronous_commit', 'off', true);
  update jobs j
  set progress = reported.progress, rev = rev + 1, updated_at = baton_now()
  from unnest(p_job_ids, p_lease_tokens, p_progress) as reported (job_id, lease_token, progress)
  where j.id = reported.job_id and j.status = 'processing' and j.lease_token = reported.lease_token
  returning j.id
$$;

-- A fenced write has to say why it was refused: the job is gone, or this attempt lost it.
create or replace function raise_lease_lost(p_job_id uuid) returns void
language plpgsql as $$
begin
  raise 'Another attempt owns job %, or it has ended.', p_job_id using errcode = 'BT410';
end
$$;

-- --- Artifacts ----------------------------------------------------------------------------

create table if not exists handoffs (
  id uuid primary key default uuidv7(),
  job_id uuid not null unique,  -- of a job that may be gone: an artifact can be kept longer
  lease_token uuid not null,
  user_id uuid not null references users,
  project_id uuid not null references projects on delete cascade,
  status text not null default 'active' check (status in ('active', 'archived')),
  title text not null,
  summary text not null,
  sources jsonb not null,
  key_changes jsonb not null,
  decisions jsonb not null,
  open_questions jsonb not null,
  next_steps jsonb not null,
  data jsonb not null,  -- the same statements with the ids of the events behind each
  related_event_ids jsonb not null,
  markdown text not null,
  scope jsonb not null,  -- {"sources", "filters"}: what makes two handoffs successors
  period_start timestamptz not null,
  period_end timestamptz not null,
  model_used text not null,
  token_usage jsonb not null,
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now()
);
create index if not exists handoffs_recent on handoffs (project_id, created_at desc, id desc);

create table if not exists insights (
  id uuid primary key default uuidv7(),
  job_id uuid not null unique,  -- of a job that may be gone: an artifact can be kept longer
  lease_token uuid not null,
  requested_by uuid not null references users,
  project_id uuid not null references projects on delete cascade,
  kind text not null references flows,
  status text not null default 'active' check (status in ('active', 'archived')),
  title text not null,
  summary text not null,
  data jsonb not null,
  related_event_ids jsonb not null,
  markdown text not null,
  period_start timestamptz not null,
  period_end timestamptz not null,
  model_used text not null,
  token_usage jsonb not null,
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now()
);
create index if not exists insights_recent on insights (project_id, created_at desc, id desc);

create table if not exists charges (
  job_id uuid primary key,  -- hence at most once; what was used stays when the job is deleted
  user_id uuid not null references users,
  project_id uuid not null,
  kind text not null references flows,
  credits int not null check (credits >= 0),
  created_at timestamptz not null default baton_now()
);
alter table charges drop constraint if exists charges_job_id_fkey;  -- of version 1
alter table charges drop constraint if exists charges_project_id_fkey;

-- Since version 2. Who owned the project when the job was completed. It refers to nothing, so that a
-- completion locks no row of users but that of the one who asked.
alter table charges
  add column if not exists payer_id uuid,
  add column if not exists from_grants int not null default 0;
do $$
begin
  if not exists (
    select from pg_constraint
    where conrelid = 'charges'::regclass and conname = 'charges_from_grants_check') then
    alter table charges add constraint charges_from_grants_check
      check (from_grants >= 0) not valid;
  end if;
end
$$;
-- later
alter table charges validate constraint charges_from_grants_check;
-- later: charges of version 1 are given their payer, and jobs what they used, which only their
-- artifacts told.
do $$
declare
  v_last uuid := '00000000-0000-0000-0000-000000000000';
  v_batch uuid[];
begin
  if (select attnotnull from pg_attribute
      where attrelid = 'charges'::regclass and attname = 'payer_id') then
    return;
  end if;
  if not exists (select from charges) then  -- such as in a new database, where nothing may commit
    alter table charges alter payer_id set not null;
    return;
  end if;
  loop
    select array_agg(job_id order by job_id) into v_batch
    from (select job_id from charges where job_id > v_last order by job_id limit 1000) c;
    exit when v_batch is null;
    update charges c
    set payer_id = coalesce((select owner_id from projects p where p.id = c.project_id), user_id)
    where job_id = any(v_batch) and payer_id is null;
    update jobs j
    set usage = a.token_usage || jsonb_build_object('credits', j.credits)
    from (
      select job_id, token_usage from handoffs where job_id = any(v_batch)
      union all
      select job_id, token_usage from insights where job_id = any(v_batch)
    ) a
    where j.id = a.job_id and j.usage is null;
    commit;
    v_last := v_batch[cardinality(v_batch)];
  end loop;
  alter table charges drop constraint if exists charges_payer_known;
  alter table charges add constraint charges_payer_known check (payer_id is not null) not valid;
  commit;
  alter table charges validate constraint charges_payer_known;
  commit;
  alter table charges alter payer_id set not null, drop constraint charges_payer_known;
end
$$;
create index if not exists charges_payer on charges (payer_id, created_at)
  include (credits, from_grants);
create index if not exists charges_from_grants on charges (payer_id) include (from_grants)
  where from_grants > 0;

-- Since version 2.
alter table handoffs add column if not exists prompt_version text;
alter table insights add column if not exists prompt_version text;

-- Until version 2 an artifact went with its job.
do $$
begin
  if exists (select from pg_constraint where conname = 'handoffs_job_id_fkey') then
    alter table handoffs drop constraint handoffs_job_id_fkey;
    alter table insights drop constraint insights_job_id_fkey;
  end if;
end
$$;

-- A job says when its artifact is gone, whoever removed it.
create or replace function note_removed_data() returns trigger
language plpgsql as $$
begin
  update jobs
  set data_removed = true, rev = rev + 1, updated_at = baton_now()
  where id = any (array(select job_id from removed)) and not data_removed;
  return null;
end
$$;
create or replace trigger handoffs_removed after delete on handoffs
  referencing old table as removed for each statement execute function note_removed_data();
create or replace trigger insights_removed after delete on insights
  referencing old table as removed for each statement execute function note_removed_data();

-- --- Search -------------------------------------------------------------------------------
--
-- What a question can reach: the events of the last 14 days, and the statements of artifacts, which
-- lead to the events behind them. An entry holds each of its words once, as the index has it:
--
--   the project       so that a question reads nothing of others, however much they wrote
--   A, B or C         where the word stands: in the title; in a name around it (resource, branch,
--                     author, files, number); in the content
--   the word          the stem, by the language of the project; or a name, as it stands
--
-- Names are what a parser of prose would tear apart: ENG-42, #123, src/login.py, user_id, a1b2c3d.

-- To enter an event takes ten times as long as to store it. So its row waits, without terms: workers
-- enter what waits bit by bit, and a question first what waits of its own project.

create table if not exists search_entries (
  id uuid primary key default uuidv7(),  -- the event's own; of a statement a new one
  project_id uuid not null references projects on delete cascade,
  artifact_id uuid,  -- whose statement it is; null: an event
  event_ids uuid[],  -- behind the statement
  source text,  -- of the event
  at timestamptz not null,
  words int,
  terms text[]  -- null: the event waits
);
create index if not exists search_entries_terms on search_entries using gin (terms)
  -- What is not in the tree yet is read whole by every search.
  with (gin_pending_list_limit = 256);
create index if not exists search_entries_recent on search_entries (project_id, at desc);
create index if not exists search_entries_waiting on search_entries (project_id, at desc)
  where terms is null;

-- The project in a term: of an id of version 7 the random end.
create or replace function search_key(p_project_id uuid) returns text
language sql immutable parallel safe as $$
  select encode(substring(uuid_send(p_project_id) from 11), 'base64')
$$;

-- A configuration may have been dropped since it was set; what comes in must not fail for that.
create or replace function search_config(p_language text) returns regconfig
language sql stable as $$
  select coalesce(
    (select oid from pg_ts_config where cfgname = p_language and pg_ts_config_is_visible(oid)
     order by oid limit 1), 'simple'::regconfig::oid)::regconfig
$$;

-- The names in a text, each also as people shorten it: a path by its last part, owner/repo#12 as #12,
-- v1.2 as 1.2, a sha by seven characters, a branch eng-42-login as eng-42.
create or replace function search_names(p_text text) returns setof text
language sql immutable as $$
  with tokens as (
    select btrim(lower(found[1]), '.-/#&+@') as bare, lower(found[1]) as token
    from regexp_matches(
      p_text, '[[:alnum:]_/#.@+-]*(?:[0-9_/#]|\.[[:alnum:]])[[:alnum:]_/#.@+-]*', 'g') found
  ), parts as materialized (
    select distinct name, substring(name from '[^/]+$') as last
    from (
      select case when token ~ '^#[0-9]' then '#' || bare else bare end as name
      from tokens
      where length(bare) > 0
    ) n
    where length(name) between 2 and 200 and name ~ '[0-9_/#.]'
  )
  select name from parts
  union
  select short
  from parts
  cross join lateral (
    values (last), (substring(last from '#[0-9]+$')), (substring(last from '^v([0-9].*)')),
      (left(substring(last from '^[0-9a-f]{8,40}$'), 7)),
      (substring(last from '^[a-z][a-z0-9]*-[0-9]+(?=-)'))
  ) s (short)
  where length(short) > 1
$$;

-- The terms of an entry.
create or replace function search_terms(
  p_project_id uuid, p_language regconfig, p_title text, p_around text, p_content text
) returns text[]
language sql stable as $$
  select coalesce(array_agg(search_key(p_project_id) || mark || word), '{}')
  from (
    select min(mark) as mark, word
    from (
      values ('A', left(p_title, 1000)), ('B', left(p_around, 2000)), ('C', left(p_content, 4000))
    ) t (mark, said)
    cross join lateral (
      select unnest(tsvector_to_array(to_tsvector(p_language, said))) as word
      union all
      select search_names(said)
    ) w
    where said is not null and length(word) <= 64
    group by word
  ) found
$$;

-- What stands around the words of an event.
create or replace function search_around(
  p_resource text, p_branch text, p_author text, p_external_id text, p_metadata jsonb
) returns text
language sql immutable as $$
  select concat_ws(' ',
    p_resource, p_branch, p_author, left(p_external_id, 200), p_metadata ->> 'identifier',
    p_metadata ->> 'key', p_metadata ->> 'tag', p_metadata ->> 'version',
    '#' || (p_metadata ->> 'number'), '#' || (p_metadata ->> 'pull_request'),
    '#' || (p_metadata ->> 'merge_request'), left(p_metadata ->> 'labels', 300),
    left(p_metadata ->> 'files', 1000))
$$;

-- Whatever stores events has them wait. What is older than a question looks back, such as the history
-- of an import, is left out.
create or replace function note_events() returns trigger
language plpgsql as $$
begin
  insert into search_entries (id, project_id, source, at)
  select e.id, e.project_id, e.source, e.occurred_at
  from added e
  where e.occurred_at > baton_now() - interval '15 days'
  on conflict do nothing;
  return null;
end
$$;
create or replace trigger events_noted after insert on events
  referencing new table as added for each statement execute function note_events();

-- Enter events that wait: of a project the newest, and all that others enter just now is waited for;
-- or, without one, of any, but none in a database that is held. Answers how many there were.
create or replace function enter_events(p_project_id uuid, p_limit int) returns int
language plpgsql as $$
declare
  v_ids uuid[];
begin
  if p_project_id is null then
    if hold_reason() is not null then
      return 0;
    end if;
    v_ids := array(
      select id from search_entries where terms is null limit p_limit for update skip locked);
  else
    v_ids := array(
      select id from search_entries
      where project_id = p_project_id and terms is null
      order by at desc, id limit p_limit for update);
  end if;
  update search_entries s
  set terms = coalesce(e.terms, '{}'), words = coalesce(cardinality(e.terms), 0)
  from unnest(v_ids) as waiting (id)
  left join lateral (
    select t.terms
    from events e
    join projects p on p.id = e.project_id
    cross join lateral search_terms(
      e.project_id, search_config(p.language), e.title,
      search_around(e.resource, e.branch, e.author, e.external_id, e.metadata),
      e.content) as t (terms)
    where e.id = waiting.id
  ) e on true
  where s.id = waiting.id;
  return coalesce(cardinality(v_ids), 0);
end
$$;

-- The statements of an artifact, as data has them; an answer is no source of answers.
create or replace function enter_statements(
  p_project_id uuid, p_artifact_id uuid, p_data jsonb, p_at timestamptz
) returns void
language sql as $$
  insert into search_entries (project_id, artifact_id, event_ids, at, words, terms)
  select
    p_project_id, p_artifact_id,
    array(select e::uuid from jsonb_array_elements_text(said -> 'event_ids') as ids (e) limit 12),
    p_at, cardinality(terms), terms
  from jsonb_path_query(p_data, 'strict $.**  ? (@.event_ids.size() > 0 && @.text.type() == "string")')
    said
  join projects p on p.id = p_project_id
  cross join lateral search_terms(
    p_project_id, search_config(p.language), said ->> 'text',
    concat_ws(' ', said ->> 'name', said ->> 'title'), null) terms
  where jsonb_typeof(said -> 'event_ids') = 'array'
$$;

create or replace function enter_artifact() returns trigger
language plpgsql as $$
begin
  perform enter_statements(new.project_id, new.id, new.data, new.created_at);
  return null;
end
$$;
create or replace trigger handoffs_entered after insert on handoffs for each row
  execute function enter_artifact();
create or replace trigger insights_entered after insert on insights for each row
  when (new.kind not in ('question', 'digest'))
  execute function enter_artifact();

-- Have what of a project is not noted yet wait, and enter the statements of its artifacts.
create or replace function note_project(p_project_id uuid) returns void
language plpgsql as $$
begin
  insert into search_entries (id, project_id, source, at)
  select id, project_id, source, occurred_at
  from events
  where project_id = p_project_id and occurred_at > baton_now() - interval '15 days'
  on conflict do nothing;
  perform enter_statements(a.project_id, a.id, a.data, a.created_at)
  from (
    select project_id, id, data, created_at from handoffs
    where project_id = p_project_id and created_at > baton_now() - interval '15 days'
    union all
    select project_id, id, data, created_at from insights
    where project_id = p_project_id and created_at > baton_now() - interval '15 days'
      and kind not in ('question', 'digest')
  ) a
  where not exists (
    select from search_entries s
    where s.project_id = a.project_id and s.at = a.created_at and s.artifact_id = a.id);
end
$$;

-- later: what was stored before there was a search.
do $$
declare
  v_project_id uuid;
begin
  if not exists (select from projects) then  -- such as in a new database, where nothing may commit
    return;
  end if;
  for v_project_id in select id from projects loop
    perform note_project(v_project_id);
    commit;
  end loop;
end
$$;

-- The words of a question: at most 32, and which of them are names.
create or replace function search_asked(p_language regconfig, p_question text)
returns table (word text, exact boolean)
language sql stable as $$
  with names as materialized (
    select name from search_names(p_question) name where length(name) <= 64
  ), prose as (
    select string_agg(token, ' ') as said
    from regexp_split_to_table(p_question, '\s+') token
    where translate(token, '0123456789_/#', '') = token and token !~ '\w\.\w'
  )
  select name, true from names
  union all
  select w, false
  from prose, unnest(tsvector_to_array(to_tsvector(p_language, coalesce(said, '')))) w
  where length(w) <= 64 and w not in (select name from names)
  limit 32
$$;

-- The events of a project that speak about a question, best first. What they cover of it counts, rare
-- words more than common ones and names twice, a title more than a long content, and news more than
-- what is older. What covers less than a third of it, and no name, is no match: then there are no rows.
create or replace function search_events(
  p_project_id uuid, p_question text, p_sources text[], p_filters jsonb, p_since timestamptz,
  p_until timestamptz, p_limit int
) returns table (id uuid, score float8)
language sql stable as $$
  with asked as materialized (
    select a.word, a.exact
    from projects p
    cross join lateral search_asked(search_config(p.language), p_question) a
    where p.id = p_project_id
  ), hits as materialized (
    select a.word, a.exact, e.id, e.at, e.artifact_id, e.event_ids,
      case m.mark when 'A' then 1 when 'B' then 0.7 else 0.6 * 200 / (200 + e.words) end as weight
    from asked a
    cross join (values ('A'), ('B'), ('C')) m (mark)
    cross join lateral (
      select s.id, s.at, s.artifact_id, s.event_ids, s.words
      from search_entries s
      where s.terms @> array[search_key(p_project_id) || m.mark || a.word]
        and s.project_id = p_project_id and s.at > p_since and s.at <= p_until
        and (p_sources is null or s.source = any (p_sources) or s.artifact_id is not null)
      limit 20000
    ) e
  ), total as materialized (
    select count(*) as entries
    from (
      select from search_entries s
      where s.project_id = p_project_id and s.at > p_since and s.at <= p_until limit 20000
    ) counted
  ), worth as materialized (
    select a.word,
      ln(1 + t.entries::float8 / greatest(1, count(h.id))) * case when a.exact then 2 else 1 end
        as worth
    from asked a
    cross join total t
    left join hits h on h.word = a.word
    group by a.word, a.exact, t.entries
  ), found as materialized (
    select h.id, h.at, h.artifact_id, h.event_ids, bool_or(h.exact) as named,
      sum(w.worth) / all_of.worth as covered, sum(w.worth * h.weight) / all_of.worth as weight
    from hits h
    join worth w on w.word = h.word
    cross join (select greatest(sum(worth), 1e-9) as worth from worth) all_of
    group by h.id, h.at, h.artifact_id, h.event_ids, all_of.worth
  ), best as materialized (
    select f.id, f.artifact_id, f.event_ids,
      f.covered * f.weight * (0.4 + 0.6 * power(
        0.5, greatest(extract(epoch from p_until - f.at), 0) / 345600)) as score  -- half in 4 days
    from found f
    where f.covered >= 0.33 or f.named
    order by score desc, f.at desc, f.id desc
    limit 2000
  )
  select e.id, max(c.score) as score
  from (
    select b.id, b.score from best b where b.artifact_id is null
    union all
    select unnest(b.event_ids), 0.8 * b.score
    from best b
    where exists (select from handoffs h where h.id = b.artifact_id and h.status = 'active')
      or exists (select from insights i where i.id = b.artifact_id and i.status = 'active')
  ) c
  join events e on e.id = c.id and e.project_id = p_project_id
  cross join lateral (select coalesce(p_filters -> e.source, '{}') as filter) f
  where e.occurred_at > p_since and e.occurred_at <= p_until
    and (p_sources is null or e.source = any (p_sources))
    and (not f.filter ? 'projects' or f.filter -> 'projects' ? e.resource)
    and (not f.filter ? 'eventTypes' or f.filter -> 'eventTypes' ? e.event_type)
    and (not f.filter ? 'branches' or f.filter -> 'branches' ? e.branch)
    and (not f.filter ? 'priorities' or f.filter -> 'priorities' ? e.priority)
  group by e.id, e.occurred_at
  order by score desc, e.occurred_at desc, e.id desc
  limit p_limit
$$;

-- --- Credits ------------------------------------------------------------------------------
--
-- The owner of a project pays for its jobs, whoever asks and whichever organization it is of. What
-- an unfinished job may cost is reserved by its being unfinished: there is no counter that a crash
-- could leave wrong, and whatever ends a job sets its credits free or turns them into its charge. So
-- only a submit can overdraw, and submits that one payer has to pay for take turns; ends of jobs
-- take no lock for it, and under a plan without a limit nothing does.
--
-- A month is one of the calendar in UTC. Its credits go first and lapse with it; grants stay until
-- they are used. Which of the two pay is settled at submit.

create table if not exists credit_grants (
  id uuid primary key default uuidv7(),
  user_id uuid not null references users,
  credits int not null check (credits <> 0),  -- below 0: a correction
  reason text not null,
  created_at timestamptz not null default baton_now()
);
create index if not exists credit_grants_user on credit_grants (user_id);

create or replace function month_of(p_time timestamptz) returns timestamptz
language sql immutable as $$
  select date_trunc('month', p_time at time zone 'UTC') at time zone 'UTC'
$$;

-- used         charged this month, grants included
-- reserved     by unfinished jobs, grants included
-- month_left   of the plan's credits of this month; null: no limit
-- grants_left  of the grants
-- resets_at    when the month ends
create or replace view balances as
select
  u.id as user_id, u.email, u.plan, p.monthly_credits, p.overage,
  charged.credits as used, reserved.credits as reserved,
  case when p.monthly_credits is not null
    then greatest(0, p.monthly_credits - charged.of_month - reserved.of_month) end as month_left,
  greatest(0, granted.credits - spent.credits - reserved.from_grants) as grants_left,
  month_of(month_of(baton_now()) + interval '32 days') as resets_at
from users u
join plans p on p.name = u.plan
cross join lateral (
  select coalesce(sum(credits), 0) as credits, coalesce(sum(credits - from_grants), 0) as of_month
  from charges
  where payer_id = u.id and created_at >= month_of(baton_now())
) charged
cross join lateral (
  select coalesce(sum(from_grants), 0) as credits
  from charges
  where payer_id = u.id and from_grants > 0
) spent
cross join lateral (
  select
    coalesce(sum(j.credits), 0) as credits, coalesce(sum(j.from_grants), 0) as from_grants,
    coalesce(sum(j.credits - j.from_grants), 0) as of_month
  from projects o
  join jobs j on j.project_id = o.id and j.status in ('pending', 'processing')
  where o.owner_id = u.id
) reserved
cross join lateral (
  select coalesce(sum(credits), 0) as credits from credit_grants where user_id = u.id
) granted;

-- What a job of this kind costs in this project and how much of it grants pay; or why it cannot be,
-- as the code, sentence and meta of a failed job. Under a plan with a limit the payer is locked until
-- the transaction ends, so that two submits at once do not both see the last credit.
create or replace function assess(
  p_project_id uuid, p_kind text, out credits int, out from_grants int, out error_code text,
  out error text, out error_meta jsonb
) language plpgsql as $$
declare
  v_payer uuid;
  v_plan plans;
  v_balance balances;
begin
  select f.credits, o.owner_id into credits, v_payer
  from flows f, projects o
  where f.kind = p_kind and o.id = p_project_id;
  select p.* into v_plan
  from users u
  join plans p on p.name = u.plan
  where u.id = v_payer;
  from_grants := 0;
  error_meta := '{}';

  if p_kind <> all (v_plan.flows) then
    error_code := 'plan_violation';
    error := format('The plan "%s" does not include artifacts of this kind (%s).',
      v_plan.name, p_kind);
    error_meta := jsonb_build_object('flow', p_kind, 'plan', v_plan.name, 'retryable', false);
    return;
  elsif v_plan.monthly_credits is null then
    return;
  end if;

  for turn in 1 .. 2 loop  -- whoever is refused in the first has waited for nobody
    select * into v_balance from balances where user_id = v_payer;
    exit when not v_plan.overage and v_balance.month_left + v_balance.grants_left < credits;
    if turn = 2 then
      from_grants := least(greatest(0, credits - v_balance.month_left), v_balance.grants_left);
      return;
    end if;
    perform pg_advisory_xact_lock(hashtextextended('baton credits ' || v_payer, 0));
  end loop;
  error_code := 'quota_exceeded';
  error := format(
    'This costs %s credit(s), and %s are left. The plan "%s" has %s a month; the next month begins '
    'on %s (UTC).',
    credits, v_balance.month_left + v_balance.grants_left, v_plan.name, v_plan.monthly_credits,
    to_char(v_balance.resets_at at time zone 'UTC', 'YYYY-MM-DD'));
  error_meta := jsonb_build_object(
    'flow', p_kind, 'plan', v_plan.name, 'required_credits', credits,
    'remaining_credits', v_balance.month_left + v_balance.grants_left,
    'resets_at', rfc3339(v_balance.resets_at), 'retryable', false);
end
$$;

-- The good end of an attempt, all or nothing: status, artifact, charge, lease and ticket. Called
-- again with the same token (its first answer was lost on the way) it answers the same job.
-- p_artifact has the columns of handoffs or insights that a worker makes.
create or replace function complete_job(
  p_job_id uuid, p_lease_token uuid, p_artifact jsonb
) returns jobs
language plpgsql as $$
declare
  v_job jobs;
  v_result_id uuid := uuidv7();
begin
  update jobs
  set
    status = 'completed',
    outcome = 'succeeded',
    result_kind = case kind when 'handoff' then 'handoff' else 'insight' end,
    result_id = v_result_id,
    progress = null,
    usage = p_artifact -> 'token_usage' || jsonb_build_object('credits', credits),
    rev = rev + 1,
    completed_at = baton_now(),
    updated_at = baton_now()
  where id = p_job_id and status = 'processing' and lease_token = p_lease_token
  returning * into v_job;
  if not found then
    select * into v_job
    from jobs
    where id = p_job_id and status = 'completed' and lease_token = p_lease_token;
    if not found then
      perform raise_lease_lost(p_job_id);
    end if;
    return v_job;
  end if;

  delete from leases where job_id = v_job.id;
  delete from procrastinate_jobs where id = v_job.ticket_id;

  if v_job.result_kind = 'handoff' then
    insert into handoffs (
      id, job_id, lease_token, user_id, project_id, title, summary, sources, key_changes,
      decisions, open_questions, next_steps, data, related_event_ids, markdown, scope,
      period_start, period_end, model_used, prompt_version, token_usage)
    select
      v_result_id, v_job.id, p_lease_token, v_job.user_id, v_job.project_id, a.title, a.summary,
      a.sources, a.key_changes, a.decisions, a.open_questions, a.next_steps, a.data,
      a.related_event_ids, a.markdown,
      jsonb_build_object(
        'sources', v_job.input -> 'sources', 'filters', v_job.input -> 'filters'),
      a.period_start, a.period_end, a.model_used, a.prompt_version, a.token_usage
    from jsonb_populate_record(null::handoffs, p_artifact) a;
  else
    insert into insights (
      id, job_id, lease_token, requested_by, project_id, kind, title, summary, data,
      related_event_ids, markdown, period_start, period_end, model_used, prompt_version,
      token_usage)
    select
      v_result_id, v_job.id, p_lease_token, v_job.user_id, v_job.project_id, v_job.kind, a.title,
      a.summary, a.data, a.related_event_ids, a.markdown, a.period_start, a.period_end,
      a.model_used, a.prompt_version, a.token_usage
    from jsonb_populate_record(null::insights, p_artifact) a;
  end if;

  insert into charges (job_id, user_id, project_id, payer_id, kind, credits, from_grants)
  select v_job.id, v_job.user_id, v_job.project_id, owner_id, v_job.kind, v_job.credits,
    v_job.from_grants
  from projects
  where id = v_job.project_id;
  return v_job;
end
$$;

-- --- Calls of models ------------------------------------------------------------------------

create table if not exists model_prices (
  model text primary key,  -- as it was asked for, or as the provider says it was
  prompt numeric not null check (prompt >= 0),  -- for a million tokens, in the operator's currency
  completion numeric not null check (completion >= 0)
);

-- Refers to nothing: what was paid for stays, whatever is deleted.
create table if not exists provider_calls (
  id bigint primary key generated always as identity,
  job_id uuid not null,
  attempt int not null,
  user_id uuid not null,
  project_id uuid not null,
  kind text not null,
  model text not null,
  purpose text not null,  -- what for: several calls may make one draft
  outcome text not null,  -- ok, or a word for how it failed
  prompt_tokens int not null,
  completion_tokens int not null,
  cost numeric,  -- by model_prices when it was made; null: not known
  seconds double precision not null,
  request_id text,  -- the provider's own name for it
  status int,  -- of the HTTP answer, if there was one
  created_at timestamptz not null default baton_now()
);
create index if not exists provider_calls_job on provider_calls (job_id);
create index if not exists provider_calls_recent on provider_calls (created_at);

-- Store calls that attempts have made, given as the columns that a worker knows. An attempt need not
-- have been the one that counted: it was paid for. asked is the model that was asked for; a provider
-- may answer a more exact name. Not worth waiting for the disk.
create or replace function record_calls(p_calls jsonb) returns void
language sql as $$
  select set_config('synchronous_commit', 'off', true);
  insert into provider_calls (
    job_id, attempt, user_id, project_id, kind, model, purpose, outcome, prompt_tokens,
    completion_tokens, cost, seconds, request_id, status)
  select
    c.job_id, c.attempt, c.user_id, c.project_id, c.kind, c.model, c.purpose, c.outcome,
    c.prompt_tokens, c.completion_tokens,
    (c.prompt_tokens * p.prompt + c.completion_tokens * p.completion) / 1000000,
    c.seconds, c.request_id, c.status
  from jsonb_array_elements(p_calls) with ordinality as e (call, place)
  cross join jsonb_populate_record(null::provider_calls, e.call) c
  left join lateral (
    select prompt, completion from model_prices
    where model in (c.model, e.call ->> 'asked') order by model <> c.model limit 1
  ) p on true
  order by e.place
$$;

-- What charges and provider_calls come to by day (UTC), user, project and payer (null: of calls), up
-- to the time of usage_counted: what is later than that is still to be added. So nobody has to read
-- years of them to tell of a month, and what has been used is known when they are gone.
create table if not exists usage_by_day (
  day date not null,
  user_id uuid not null,
  project_id uuid not null,
  payer_id uuid,
  completed_jobs bigint not null default 0,
  credits bigint not null default 0,
  from_grants bigint not null default 0,  -- of the credits
  calls bigint not null default 0,
  prompt_tokens bigint not null default 0,
  completion_tokens bigint not null default 0,
  cost numeric
);
create unique index if not exists usage_by_day_once
  on usage_by_day (day, user_id, project_id, payer_id) nulls not distinct;
create table if not exists usage_counted (
  one boolean primary key default true check (one),
  until timestamptz not null
);
create index if not exists charges_recent on charges (created_at);

-- Add to usage_by_day what it lacks, at most about p_limit charges and as many calls at once. Answers
-- how many; only one process at a time counts.
--
-- A row has the time at which its transaction began, and can be seen when that has ended. None takes
-- ten minutes: a statement ends after 8 s, a transaction that does nothing after 5 s.
create or replace function count_usage(p_limit int) returns bigint
language plpgsql security definer set search_path = public, pg_temp as $$
declare
  v_from timestamptz;
  v_until timestamptz := baton_now() - interval '10 minutes';
  v_counted bigint;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('baton count usage', 0)) then
    return 0;
  end if;
  v_from := coalesce((select until from usage_counted), '-infinity');
  v_until := least(
    v_until,
    (select created_at from charges where created_at >= v_from
     order by created_at offset p_limit limit 1),
    (select created_at from provider_calls where created_at >= v_from
     order by created_at offset p_limit limit 1));
  if v_until <= v_from then
    return 0;
  end if;

  with used as (
    select (created_at at time zone 'UTC')::date as day, user_id, project_id, payer_id,
      count(*) as completed_jobs, sum(credits) as credits, sum(from_grants) as from_grants,
      0 as calls, 0 as prompt_tokens, 0 as completion_tokens, null::numeric as cost
    from charges
    where created_at >= v_from and created_at < v_until
    group by day, user_id, project_id, payer_id
    union all
    select (created_at at time zone 'UTC')::date as day, user_id, project_id, null,
      0, 0, 0, count(*), sum(prompt_tokens), sum(completion_tokens), sum(cost)
    from provider_calls
    where created_at >= v_from and created_at < v_until
    group by day, user_id, project_id
  ),
  added as (
    insert into usage_by_day as u (
      day, user_id, project_id, payer_id, completed_jobs, credits, from_grants, calls,
      prompt_tokens, completion_tokens, cost)
    select * from used
    on conflict (day, user_id, project_id, payer_id) do update
    set
      completed_jobs = u.completed_jobs + excluded.completed_jobs,
      credits = u.credits + excluded.credits,
      from_grants = u.from_grants + excluded.from_grants,
      calls = u.calls + excluded.calls,
      prompt_tokens = u.prompt_tokens + excluded.prompt_tokens,
      completion_tokens = u.completion_tokens + excluded.completion_tokens,
      cost = case when coalesce(u.cost, excluded.cost) is not null
        then coalesce(u.cost, 0) + coalesce(excluded.cost, 0) end
  )
  select coalesce(sum(completed_jobs + calls), 0) into v_counted from used;
  insert into usage_counted (until) values (v_until)
  on conflict (one) do update set until = excluded.until;
  return v_counted;
end
$$;

create or replace function outcome_of(p_error_code text) returns text
language sql immutable as $$
  select case p_error_code
    when 'timeout' then 'timed_out'
    when 'cancelled' then 'cancelled'
    else 'failed'
  end
$$;

-- The bad end of an attempt: a code, a sentence for a person, and no charge.
create or replace function fail_job(
  p_job_id uuid, p_lease_token uuid, p_error_code text, p_error text, p_error_meta jsonb
) returns jobs
language plpgsql as $$
declare
  v_job jobs;
begin
  update jobs
  set
    status = 'failed',
    outcome = outcome_of(p_error_code),
    error_code = p_error_code,
    error = p_error,
    error_meta = p_error_meta,
    rev = rev + 1,
    completed_at = baton_now(),
    updated_at = baton_now()
  where id = p_job_id and status = 'processing' and lease_token = p_lease_token
  returning * into v_job;
  if not found then
    select * into v_job
    from jobs
    where id = p_job_id and status = 'failed' and lease_token = p_lease_token;
    if not found then
      perform raise_lease_lost(p_job_id);
    end if;
    return v_job;
  end if;
  delete from leases where job_id = v_job.id;
  delete from procrastinate_jobs where id = v_job.ticket_id;
  return v_job;
end
$$;

-- Give a job back unfinished, for example because the worker has to stop. The ticket goes back
-- to its queue, so that the next worker takes it at once.
create or replace function release_job(p_job_id uuid, p_lease_token uuid) returns jobs
language plpgsql as $$
declare
  v_job jobs;
begin
  update jobs
  set status = 'pending', progress = null, lease_token = null, releases = releases + 1, rev = rev + 1,
    updated_at = baton_now()
  where id = p_job_id and status = 'processing' and lease_token = p_lease_token
  returning * into v_job;
  if not found then
    perform raise_lease_lost(p_job_id);
  end if;
  delete from leases where job_id = v_job.id;
  update procrastinate_jobs
  set status = 'todo', worker_id = null, abort_requested = false
  where id = v_job.ticket_id;
  return v_job;
end
$$;

-- --- When something went wrong ---------------------------------------------------------------

-- How an attempt ends when the job goes on: the lease and the ticket go, the job waits again.
-- Called under the lock of a job that is processing.
create or replace function back_to_pending(p_job jobs) returns void
language plpgsql as $$
begin
  delete from leases where job_id = p_job.id;
  delete from procrastinate_jobs where id = p_job.ticket_id;
  update jobs
  set status = 'pending', progress = null, lease_token = null, ticket_id = null, rev = rev + 1,
    updated_at = baton_now()
  where id = p_job.id;
end
$$;

-- How a job ends for good other than by an answer. p_lease_token is that of the attempt which ended
-- it, or null: a late attempt must not be told that it did. Called under the job's lock.
create or replace function end_job(
  p_job jobs, p_lease_token uuid, p_outcome text, p_error_code text, p_error text, p_error_meta jsonb
) returns void
language plpgsql as $$
begin
  delete from leases where job_id = p_job.id;
  delete from job_due where job_id = p_job.id;
  delete from procrastinate_jobs where id = p_job.ticket_id;
  update jobs
  set status = 'failed', lease_token = p_lease_token, outcome = p_outcome, error_code = p_error_code,
    error = p_error, error_meta = p_error_meta, rev = rev + 1, completed_at = baton_now(),
    updated_at = baton_now()
  where id = p_job.id;
end
$$;

-- Give a pending job a new ticket, or put it in line for one. Called under the job's lock.
create or replace function defer_again(p_job_id uuid) returns void
language plpgsql as $$
declare
  v_job jobs;
  v_reason text;
begin
  select * into v_job from jobs where id = p_job_id;
  v_reason := waits_for(v_job.kind, v_job.project_id);
  if v_reason is not null then
    perform put_in_line(v_job, v_reason);
    return;
  end if;
  delete from job_due where job_id = p_job_id;
  update jobs
  set ticket_id = defer_ticket(
    p_job_id, case when front then 'front' else priority end, kind)
  where id = p_job_id;
end
$$;

-- The running job of a lease, locked; BT410 when the lease is not the job's current one.
create or replace function lock_held_job(p_job_id uuid, p_lease_token uuid) returns jobs
language plpgsql as $$
declare
  v_job jobs;
begin
  select * into v_job
  from jobs
  where id = p_job_id and status = 'processing' and lease_token = p_lease_token
  for update;
  if not found then
    perform raise_lease_lost(p_job_id);
  end if;
  return v_job;
end
$$;

-- A provider error that may pass: try again after p_delay_seconds. The fifth is final, and so is
-- one that would be tried only after the deadline; the job then fails with the code and sentence.
create or replace function park_job(
  p_job_id uuid, p_lease_token uuid, p_delay_seconds double precision, p_error_code text,
  p_error text, p_error_meta jsonb
) returns text
language plpgsql as $$
declare
  v_job jobs := lock_held_job(p_job_id, p_lease_token);
  v_due timestamptz := baton_now() + p_delay_seconds * interval '1 second';
begin
  update jobs set provider_errors = provider_errors + 1 where id = p_job_id;
  if v_job.provider_errors + 1 >= 5 or v_due > v_job.deadline_at then
    perform end_job(
      v_job, p_lease_token, outcome_of(p_error_code), p_error_code, p_error, p_error_meta);
    return 'failed';
  end if;
  perform back_to_pending(v_job);
  insert into job_due (job_id, not_before) values (p_job_id, v_due);
  return 'pending';
end
$$;

-- The provider is down, which is not the job's doing: try again after p_delay_seconds. Counts for
-- nothing, so that only the job's deadline ends it; its progress says what it waits for.
create or replace function hold_job(
  p_job_id uuid, p_lease_token uuid, p_delay_seconds double precision
) returns text
language plpgsql as $$
declare
  v_job jobs := lock_held_job(p_job_id, p_lease_token);
begin
  delete from leases where job_id = p_job_id;
  delete from procrastinate_jobs where id = v_job.ticket_id;
  update jobs
  set status = 'pending', lease_token = null, ticket_id = null, releases = releases + 1,
    progress = jsonb_build_object('value', 0, 'step', 'waiting', 'message',
      'The provider does not answer; it is asked again from time to time.'),
    rev = rev + 1, updated_at = baton_now()
  where id = p_job_id;
  insert into job_due (job_id, not_before)
  values (p_job_id, baton_now() + p_delay_seconds * interval '1 second');
  return 'pending';
end
$$;

-- The process that ran just this attempt died while its worker lives: the job did that. The third
-- time is final, so a job that kills its process cannot go on for ever.
create or replace function crash_job(
  p_job_id uuid, p_lease_token uuid, p_error text, p_error_meta jsonb
) returns text
language plpgsql as $$
declare
  v_job jobs := lock_held_job(p_job_id, p_lease_token);
begin
  update jobs set crashes = crashes + 1 where id = p_job_id;
  if v_job.crashes + 1 >= 3 then
    perform end_job(v_job, p_lease_token, 'failed', 'worker_lost', p_error, p_error_meta);
    return 'failed';
  end if;
  perform back_to_pending(v_job);
  perform defer_again(p_job_id);
  return 'pending';
end
$$;

-- What sweep_job should look at: leases that have expired, jobs past their deadline.
create or replace function sweepable(p_limit int) returns setof uuid
language sql stable as $$
  (select job_id from leases where expires_at < baton_now() order by expires_at limit p_limit)
  union
  (select id from jobs
   where status in ('pending', 'processing') and deadline_at < baton_now()
   order by deadline_at limit p_limit)
  union
  (select id from jobs
   where status = 'pending' and started_at is null and start_deadline_at < baton_now()
   order by start_deadline_at limit p_limit)
$$;

-- One job, one transaction: whoever holds the job's lock is busy with it, so it is skipped, and the
-- lease is looked at again under the lock. Answers the job's new status, or null for no change.
--
-- Twice a dead worker counts against a job. From then on the job runs in a process of its own
-- (tasks/executor.py), where crash_job knows for sure; a worker that dies all the same is not the
-- job's fault, but ten attempts are enough of anything.
create or replace function sweep_job(p_job_id uuid) returns text
language plpgsql as $$
declare
  v_job jobs;
begin
  select * into v_job
  from jobs
  where id = p_job_id and status in ('pending', 'processing')
  for update skip locked;
  if not found then
    return null;
  end if;

  if v_job.started_at is null and v_job.start_deadline_at < baton_now() then
    perform end_job(
      v_job, null, 'expired', 'timeout', 'The job was not started by the time that was asked for.',
      jsonb_build_object('retryable', true, 'attempts', 0, 'stage', 'queued'));
    return 'failed';
  end if;

  if v_job.deadline_at < baton_now() then
    perform end_job(
      v_job, null, case when v_job.attempt = 0 then 'expired' else 'timed_out' end, 'timeout',
      'The job was not done by its deadline.',
      jsonb_build_object('retryable', true, 'attempts', v_job.attempt,
        'stage', case v_job.status when 'pending' then 'queued' else 'generating' end));
    return 'failed';
  end if;

  if v_job.status = 'pending' or exists (
    select from leases where job_id = p_job_id and expires_at >= baton_now()) then
    return null;
  end if;

  if v_job.attempt - v_job.releases >= 10 then
    perform end_job(
      v_job, null, 'failed', 'worker_lost', 'The worker was lost again and again while it ran this job.',
      jsonb_build_object('retryable', true, 'attempts', v_job.attempt));
    return 'failed';
  end if;
  update jobs set crashes = least(crashes + 1, 2) where id = p_job_id;
  perform back_to_pending(v_job);
  perform defer_again(p_job_id);
  return 'pending';
end
$$;

-- Bring back what is due. Answers how many.
create or replace function wake_due(p_limit int) returns int
language plpgsql as $$
declare
  v_job_id uuid;
  v_count int := 0;
begin
  for v_job_id in
    select j.id
    from job_due d
    join jobs j on j.id = d.job_id
    where d.not_before <= baton_now() and j.status = 'pending'
    order by d.not_before
    limit p_limit
    for update of j skip locked
  loop
    perform defer_again(v_job_id);
    v_count := v_count + 1;
  end loop;
  return v_count;
end
$$;

-- Plans that were made when nobody stood in line would read all of the line, until autovacuum sees
-- to it a minute later.
create or replace function analyze_line() returns void
language plpgsql security definer set search_path = public, pg_temp as $$
begin
  if (select reltuples from pg_class where oid = 'job_due'::regclass) < 1000 then
    analyze job_due;
  end if;
end
$$;

-- What operators hold back, made true for the jobs that have been there before: lets go what is held
-- back no more, and holds back what stands at the head of the queue and should not. Answers how
-- many; after p_limit there may be more.
create or replace function wake_held(p_limit int) returns int
language plpgsql as $$
declare
  v_project_id uuid;
  v_job_id uuid;
  v_count int := 0;
  v_moved int;
begin
  for v_job_id in
    select j.id
    from flows f
    cross join lateral (
      select d.job_id, d.rank, d.created_at
      from job_due d
      where d.line = f.kind and d.reason = 'paused'
      order by d.rank desc, d.created_at, d.job_id
      limit p_limit
    ) d
    join jobs j on j.id = d.job_id
    where j.status = 'pending'
      and not exists (select from pauses p where p.kind is null or p.kind = f.kind)
    order by d.rank desc, d.created_at, d.job_id
    limit p_limit
    for update of j skip locked
  loop
    perform defer_again(v_job_id);
    v_count := v_count + 1;
  end loop;

  -- Tries for the locks, because it takes several.
  for v_project_id in
    select c.project_id
    from project_concurrency c
    where exists (
      select from job_due d where d.line = c.project_id::text and d.reason = 'concurrency')
  loop
    exit when v_count >= p_limit;
    if pg_try_advisory_xact_lock(hashtextextended('baton concurrency ' || v_project_id, 0)) then
      v_count := v_count + let_go(v_project_id, p_limit - v_count);
    end if;
  end loop;

  if v_count < p_limit and exists (select from pauses union all select from project_concurrency)
    and pg_try_advisory_xact_lock(hashtextextended('baton wake held', 0)) then
    with held as (
      select
        j.id, j.ticket_id, j.created_at, t.priority, waits.reason,
        case waits.reason when 'paused' then j.kind else j.project_id::text end as line
      from (
        select id, priority, args from procrastinate_jobs
        where status = 'todo' order by priority desc, id limit 1000
      ) t
      join jobs j on j.id = (t.args ->> 'job_id')::uuid and j.ticket_id = t.id
      cross join lateral (
        select case
          when exists (select from pauses p where p.kind is null or p.kind = j.kind) then 'paused'
          when exists (
            select from project_concurrency c
            where c.project_id = j.project_id and c.concurrency is not null)
            and not exists (
              select from job_due d where d.job_id = j.id and d.reason = 'admitted')
            then 'concurrency'
        end as reason
      ) waits
      where j.status = 'pending' and waits.reason is not null
      order by t.priority desc, t.id
      limit p_limit - v_count
      for update of j skip locked
    ),
    ended as (
      delete from procrastinate_jobs t using held where t.id = held.ticket_id
    )
    insert into job_due (job_id, not_before, reason, line, rank, created_at)
    select id, 'infinity', reason, line, priority, created_at from held
    on conflict (job_id) do update
    set not_before = excluded.not_before, reason = excluded.reason, line = excluded.line,
      rank = excluded.rank, created_at = excluded.created_at;
    get diagnostics v_moved = row_count;
    v_count := v_count + v_moved;
    if v_count >= p_limit then
      perform analyze_line();
    end if;
  end if;
  return v_count;
end
$$;

-- Jobs that nothing would ever wake: pending for a while, not parked, and without a ticket. Also
-- gives a processing job that has no lease an expired one, so that the sweep finds it. Answers how
-- many were mended; only one process at a time looks.
create or replace function reconcile_jobs(p_limit int) returns int
language plpgsql as $$
declare
  v_job_id uuid;
  v_count int := 0;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('baton reconcile jobs', 0)) then
    return 0;
  end if;
  for v_job_id in
    select j.id
    from jobs j
    where j.status = 'pending' and j.updated_at < baton_now() - interval '10 seconds'
      and not exists (select from job_due d where d.job_id = j.id and d.reason <> 'admitted')
      and not exists (select from procrastinate_jobs t where t.id = j.ticket_id)
    limit p_limit
    for update of j skip locked
  loop
    perform defer_again(v_job_id);
    v_count := v_count + 1;
  end loop;
  insert into leases (job_id, lease_token, worker, expires_at)
  select j.id, j.lease_token, 'none', baton_now() - interval '1 second'
  from jobs j
  where j.status = 'processing' and not exists (select from leases l where l.job_id = j.id)
  on conflict do nothing;
  return v_count;
end
$$;

-- The worker processes, for people and for what they tell them; tickets refer to the rows of
-- procrastinate_workers. Ended ones stay for a day.
create table if not exists workers (
  id bigint primary key,  -- of procrastinate_workers
  name text not null,  -- as in leases.worker
  host text not null,
  version text not null,  -- of Baton
  concurrency int not null,  -- attempts that it runs at once, at most
  provider text not null,
  state text not null default 'running' check (state in ('running', 'draining', 'stopped', 'lost')),
  started_at timestamptz not null default baton_now(),
  seen_at timestamptz not null default baton_now(),  -- its last heartbeat
  breaker_until timestamptz  -- its provider is down, and is not asked again before that
);

-- The heartbeat of a worker, which also writes its row at the first one: p_worker is what the row
-- says of it, p_breaker_seconds how long its provider is left alone; null: it answers. Answers the
-- worker's state, so that it learns of ops.drain_worker; null: others have taken it for dead.
create or replace function beat(
  p_worker_id bigint, p_worker jsonb, p_breaker_seconds double precision
) returns text
language plpgsql as $$
declare
  v_state text;
begin
  update procrastinate_workers set last_heartbeat = now() where id = p_worker_id;
  if not found then
    return null;
  end if;
  insert into workers (id, name, host, version, concurrency, provider, breaker_until)
  select
    p_worker_id, w.name, w.host, w.version, w.concurrency, w.provider,
    baton_now() + p_breaker_seconds * interval '1 second'
  from jsonb_populate_record(null::workers, p_worker) w
  on conflict (id) do update
  set seen_at = baton_now(), breaker_until = excluded.breaker_until
  returning state into v_state;
  return v_state;
end
$$;

-- A worker has ended in order.
create or replace function stop_worker(p_worker_id bigint) returns void
language sql as $$
  update workers set state = 'stopped', seen_at = baton_now()
  where id = p_worker_id and state <> 'lost'
$$;

-- Tickets that a worker took and will never end, because it has not been heard of for
-- p_dead_seconds: back to the queue when their job still waits for them, else away. Answers how
-- many; only one process at a time looks.
create or replace function reconcile_tickets(p_dead_seconds double precision) returns int
language plpgsql as $$
declare
  v_returned int;
  v_dropped int;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('baton reconcile tickets', 0)) then
    return 0;
  end if;
  -- Sets worker_id of their tickets to null.
  delete from procrastinate_workers
  where last_heartbeat < now() - p_dead_seconds * interval '1 second';
  update workers w
  set state = 'lost'
  where w.state in ('running', 'draining')
    and not exists (select from procrastinate_workers p where p.id = w.id);
  delete from workers
  where id in (
    select id from workers
    where state in ('stopped', 'lost') and seen_at < baton_now() - interval '1 day'
    order by id
    limit 1000
    for update skip locked);

  update procrastinate_jobs t
  set status = 'todo', abort_requested = false
  from jobs j
  where t.status = 'doing' and t.worker_id is null and j.ticket_id = t.id
    and j.id = (t.args ->> 'job_id')::uuid and j.status = 'pending';
  get diagnostics v_returned = row_count;

  delete from procrastinate_jobs t
  where t.status = 'doing' and t.worker_id is null and not exists (
    select from jobs j
    where j.id = (t.args ->> 'job_id')::uuid and j.ticket_id = t.id
      and j.status in ('pending', 'processing'));
  get diagnostics v_dropped = row_count;
  return v_returned + v_dropped;
end
$$;

-- Tickets that a living worker holds in the table but not in its hands, because the answer to its
-- claim was lost: p_held are those it knows. Answers them; the worker gives back the ones that it
-- sees twice.
create or replace function unknown_tickets(p_worker_id bigint, p_held bigint[])
returns setof bigint
language sql stable as $$
  select id
  from procrastinate_jobs
  where status = 'doing' and worker_id = p_worker_id and id <> all (p_held)
$$;

-- --- Webhooks -----------------------------------------------------------------------------

create table if not exists webhook_endpoints (
  id uuid primary key default uuidv7(),
  project_id uuid not null references projects on delete cascade,
  url text not null check (length(url) between 8 and 2000),
  types text[] not null
    check (types <@ array['job.completed', 'job.failed', 'job.processing', 'job.progress']
      and cardinality(types) between 1 and 4),
  enabled boolean not null default true,
  disabled_reason text,  -- one sentence, when not a person has switched it off
  failing_since timestamptz,  -- the first failed attempt since the last one that succeeded
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now(),
  constraint webhook_endpoints_url unique (project_id, url)
);

-- They sign, so they are stored as they are; nothing lists them. Rotation gives the old one an end.
create table if not exists webhook_secrets (
  id uuid primary key default uuidv7(),
  project_id uuid not null references projects on delete cascade,
  endpoint_id uuid references webhook_endpoints on delete cascade,  -- null: for job.webhook_url
  secret text not null check (secret ~ '^whsec_[A-Za-z0-9+/]{32,86}={0,2}$'),
  created_at timestamptz not null default baton_now(),
  expires_at timestamptz  -- null: the current one
);
create unique index if not exists webhook_secrets_current
  on webhook_secrets (project_id, endpoint_id) nulls not distinct where expires_at is null;
create index if not exists webhook_secrets_of on webhook_secrets (project_id, endpoint_id);
create index if not exists webhook_secrets_endpoint on webhook_secrets (endpoint_id);

create table if not exists webhook_deliveries (
  -- The message id: the same on every attempt, made here, and without a dot, which signatures use.
  id text primary key default 'msg_' || replace(uuidv7()::text, '-', ''),
  job_id uuid not null references jobs on delete cascade,
  project_id uuid not null references projects on delete cascade,
  endpoint_id uuid references webhook_endpoints on delete cascade,  -- null: job.webhook_url
  url text not null,
  host text not null
    generated always as (coalesce(
      lower(substring(url from '^[A-Za-z]+://(\[[^]]*\]|[^/?#:]*)')), '')) stored,
  type text not null
    check (type in ('job.completed', 'job.failed', 'job.processing', 'job.progress')),
  payload text not null check (octet_length(payload) < 20000),  -- what is signed and sent
  state text not null default 'waiting' check (state in ('waiting', 'delivered', 'dead')),
  attempt int not null default 0,  -- attempts made since it was queued or replayed
  -- Due from then on. While an attempt runs this is its lease, and the value is its fence. Null
  -- while nothing is to be done: it has ended, or its endpoint is disabled.
  next_attempt_at timestamptz default baton_now(),
  created_at timestamptz not null default baton_now(),
  ended_at timestamptz,
  constraint webhook_deliveries_ended
    check ((state = 'waiting') = (ended_at is null) and (state = 'waiting' or next_attempt_at is null))
) with (fillfactor = 80);
-- Version 1 knew no host of some URLs. Nothing over HTTP made a webhook then, so there are few rows.
do $$
begin
  if not exists (
    select from pg_attrdef
    where adrelid = 'webhook_deliveries'::regclass and pg_get_expr(adbin, adrelid) ~* '^coalesce\(lower')
  then
    alter table webhook_deliveries drop column host cascade;  -- a view of ops, made again below
    alter table webhook_deliveries add column host text not null
      generated always as (coalesce(
        lower(substring(url from '^[A-Za-z]+://(\[[^]]*\]|[^/?#:]*)')), '')) stored;
  end if;
end
$$;
-- What makes a duplicate impossible; progress is the one type that a job has several of.
create unique index if not exists webhook_deliveries_once
  on webhook_deliveries (job_id, endpoint_id, type) nulls not distinct where type <> 'job.progress';
create index if not exists webhook_deliveries_of_job on webhook_deliveries (job_id, id);
create index if not exists webhook_deliveries_of_project on webhook_deliveries (project_id, id);
create index if not exists webhook_deliveries_of_endpoint on webhook_deliveries (endpoint_id, id);
create index if not exists webhook_deliveries_due on webhook_deliveries (host, next_attempt_at)
  where next_attempt_at is not null;

create table if not exists webhook_attempts (
  delivery_id text not null references webhook_deliveries on delete cascade,
  id bigint generated always as identity,
  at timestamptz not null,
  status int,  -- of the answer, if there was one
  ms int not null check (ms >= 0),
  error text,  -- one sentence; null: delivered
  primary key (delivery_id, id)
);

-- 32 random bytes in the form of the Standard Webhooks: four random UUIDs hold 488 random bits, and
-- nobody can predict their SHA-256.
create or replace function add_webhook_secret(p_project_id uuid, p_endpoint_id uuid) returns text
language sql as $$
  insert into webhook_secrets (project_id, endpoint_id, secret)
  values (p_project_id, p_endpoint_id, 'whsec_' || encode(sha256(
    uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
    || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'))
  on conflict do nothing
  returning secret
$$;

create or replace function rfc3339(p_time timestamptz) returns text
language sql stable as $$
  select to_char(p_time at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

-- The body of a webhook: the job as GET answers it, never the artifact. Metadata are the caller's own
-- and can be long; a job that would make the body too large is sent with its first eleven fields.
drop function if exists webhook_payload(jobs, text);  -- of version 1
create or replace function webhook_payload(p_job_id uuid, p_type text) returns text
language plpgsql stable as $$
declare
  v_row job_objects;
  v_job jsonb;
  v_self text := '/api/v1/jobs/' || p_job_id;
  v_payload text;
begin
  select * into strict v_row from job_objects where id = p_job_id;
  v_job := to_jsonb(v_row) - array['rev', 'not_before', 'read_at'] || jsonb_build_object(
    'created_at', rfc3339(v_row.created_at), 'updated_at', rfc3339(v_row.updated_at),
    'started_at', rfc3339(v_row.started_at), 'completed_at', rfc3339(v_row.completed_at),
    'cancel_requested_at', rfc3339(v_row.cancel_requested_at),
    'start_deadline_at', rfc3339(v_row.start_deadline_at),
    'deadline_at', rfc3339(v_row.deadline_at), 'expires_at', rfc3339(v_row.expires_at),
    'eta', null,
    'urls', jsonb_build_object(
      'self', v_self, 'cancel', v_self || '/cancel', 'retry', v_self || '/retry',
      'events', v_self || '/events'));
  for v_size in 1..2 loop
    v_payload := json_build_object(
      'type', p_type, 'timestamp', rfc3339(baton_now()),
      'data', json_build_object('job', v_job, 'result_url', v_self))::text;
    exit when octet_length(v_payload) < 20000;
    v_job := jsonb_build_object(
      'id', v_row.id, 'project_id', v_row.project_id, 'kind', v_row.kind, 'status', v_row.status,
      'result_kind', v_row.result_kind, 'result_id', v_row.result_id,
      'error', left(v_row.error, 1000), 'error_code', v_row.error_code, 'error_meta', '{}'::jsonb,
      'created_at', rfc3339(v_row.created_at), 'updated_at', rfc3339(v_row.updated_at));
  end loop;
  return v_payload;
end
$$;

-- Queues the deliveries of a change of a job, in the transaction that makes it: no code path can
-- forget one, and none can announce what is rolled back.
create or replace function queue_webhooks() returns trigger
language plpgsql as $$
declare
  v_type text := case
    when new.status in ('completed', 'failed') then 'job.' || new.status
    when new.status = 'processing' and old.status = 'pending' then 'job.processing'
    else 'job.progress'
  end;
begin
  if new.webhook_url is not null and new.status in ('completed', 'failed') and not exists (
    select from webhook_secrets s
    where s.project_id = new.project_id and s.endpoint_id is null and s.expires_at is null) then
    perform add_webhook_secret(new.project_id, null);
  end if;
  insert into webhook_deliveries (job_id, project_id, endpoint_id, url, type, payload)
  select new.id, new.project_id, target.endpoint_id, target.url, v_type,
    webhook_payload(new.id, v_type)
  from (
    select null::uuid as endpoint_id, new.webhook_url as url
    where new.webhook_url is not null and new.status in ('completed', 'failed')
    union all
    select e.id, e.url
    from (  -- locked, so that an endpoint that is being deleted cannot fail the end of a job
      select id, url
      from webhook_endpoints
      where project_id = new.project_id and enabled and v_type = any (types)
      order by id
      for key share
    ) e
  ) target
  where v_type <> 'job.progress' or not exists (
    select from webhook_deliveries d
    where d.job_id = new.id and d.endpoint_id = target.endpoint_id and d.type = v_type
      and d.created_at > baton_now() - interval '5 seconds')
  on conflict do nothing;
  return null;
end
$$;
create or replace trigger jobs_queue_webhooks after update on jobs for each row
  when ((new.status <> old.status and new.status <> 'pending')
    or (new.status = 'processing' and new.progress is distinct from old.progress))
  execute function queue_webhooks();
-- What the plan or the quota refuses is a failed job from the start.
create or replace trigger jobs_queue_webhooks_at_once after insert on jobs for each row
  when (new.status in ('completed', 'failed'))
  execute function queue_webhooks();

-- Take what is due, for p_lease_seconds: at most p_limit, and of one host at most p_per_host, or as
-- many as p_free says of it. From host to host by the index, so that the long queue of a dead
-- receiver is not read, let alone waited for. Answers what an attempt needs.
create or replace function claim_webhooks(
  p_limit int, p_per_host int, p_hosts text[], p_free int[], p_lease_seconds double precision
) returns table (
  id text, job_id uuid, project_id uuid, url text, host text, type text, payload text,
  attempt int, leased_until timestamptz, created_at timestamptz, secrets text[]
) language plpgsql as $$
#variable_conflict use_column
begin
  if hold_reason() is not null then
    return;
  end if;
  return query
  with recursive hosts as (
    (select d.host from webhook_deliveries d
     where d.next_attempt_at is not null order by d.host limit 1)
    union all
    select (
      select d.host from webhook_deliveries d
      where d.next_attempt_at is not null and d.host > h.host order by d.host limit 1)
    from hosts h
    where h.host is not null
  ),
  due as (
    select first.id
    from hosts h
    left join unnest(p_hosts, p_free) as busy (host, free) on busy.host = h.host
    cross join lateral (
      select d.id, d.next_attempt_at
      from webhook_deliveries d
      where d.host = h.host and d.next_attempt_at <= baton_now()
      order by d.next_attempt_at
      limit coalesce(busy.free, p_per_host)
      for update skip locked
    ) first
    order by first.next_attempt_at
    limit p_limit
  ),
  claimed as (
    update webhook_deliveries d
    set next_attempt_at = baton_now() + p_lease_seconds * interval '1 second'
    from due
    where d.id = due.id
    returning d.*
  )
  select
    c.id, c.job_id, c.project_id, c.url, c.host, c.type, c.payload, c.attempt + 1,
    c.next_attempt_at, c.created_at,
    array(
      select s.secret from webhook_secrets s
      where s.project_id = c.project_id and s.endpoint_id is not distinct from c.endpoint_id
        and (s.expires_at is null or s.expires_at > baton_now())
      order by s.id desc)
  from claimed c;
end
$$;

-- Disable an endpoint; what waits for it waits on. Called under the endpoint's lock.
create or replace function disable_webhook(p_endpoint_id uuid, p_reason text) returns void
language sql as $$
  update webhook_endpoints
  set enabled = false, disabled_reason = p_reason, updated_at = baton_now()
  where id = p_endpoint_id;
  update webhook_deliveries
  set next_attempt_at = null
  where endpoint_id = p_endpoint_id and state = 'waiting';
$$;

-- Note an attempt and what follows from it: without an error it is delivered; without
-- p_retry_seconds it is dead; else it is due again later. p_gone disables the endpoint, and so does
-- failing for five days. A lease that has run out means that another attempt decides, unless this
-- one has succeeded. Answers the state, or null when this attempt decides nothing.
-- Lock order: endpoint, delivery.
create or replace function webhook_attempted(
  p_id text, p_leased_until timestamptz, p_at timestamptz, p_status int, p_ms int, p_error text,
  p_retry_seconds double precision, p_gone boolean
) returns text
language plpgsql as $$
declare
  v_endpoint webhook_endpoints;
  v_state text;
begin
  select e.* into v_endpoint
  from webhook_deliveries d
  join webhook_endpoints e on e.id = d.endpoint_id
  where d.id = p_id
  for no key update of e;
  perform from webhook_deliveries where id = p_id for no key update;
  if not found then
    return null;
  end if;
  insert into webhook_attempts (delivery_id, at, status, ms, error)
  values (p_id, p_at, p_status, p_ms, p_error);

  update webhook_deliveries
  set
    attempt = attempt + 1,
    state = case
      when p_error is null then 'delivered'
      when p_retry_seconds is null then 'dead'
      else 'waiting' end,
    next_attempt_at = case
      when p_error is not null then baton_now() + p_retry_seconds * interval '1 second' end,
    ended_at = case when p_error is null or p_retry_seconds is null then baton_now() end
  where id = p_id and state = 'waiting' and (next_attempt_at = p_leased_until or p_error is null)
  returning state into v_state;
  if not found then
    return null;
  end if;

  if p_error is null then
    update webhook_endpoints
    set failing_since = null
    where id = v_endpoint.id and failing_since is not null;
  elsif p_gone then
    perform disable_webhook(v_endpoint.id, 'The receiver answered 410 Gone.');
  elsif v_endpoint.failing_since < baton_now() - interval '5 days' then
    perform disable_webhook(
      v_endpoint.id,
      format('No attempt has succeeded since %s.', rfc3339(v_endpoint.failing_since)));
  elsif v_endpoint.failing_since is null then
    update webhook_endpoints set failing_since = baton_now() where id = v_endpoint.id;
  end if;
  return v_state;
end
$$;

-- Give a claimed delivery back at once, because the worker stops.
create or replace function release_webhook(p_id text, p_leased_until timestamptz) returns void
language sql as $$
  update webhook_deliveries
  set next_attempt_at = baton_now()
  where id = p_id and next_attempt_at = p_leased_until
$$;

-- Answers BT404 or BT403 unless the role, null when nothing was found, may change webhooks.
create or replace function assert_webhook_admin(p_access_role text, p_noun text) returns void
language plpgsql immutable as $$
begin
  if p_access_role is null then
    raise '%_id: no % with this id is visible to this key.', p_noun, p_noun using errcode = 'BT404';
  elsif p_access_role = 'member' then
    raise 'Only an owner or admin of the project may do this to its webhooks.'
      using errcode = 'BT403';
  end if;
end
$$;

create or replace function project_role(p_user_id uuid, p_project_id uuid) returns text
language sql stable as $$
  select access_role from project_access where user_id = p_user_id and project_id = p_project_id
$$;

-- The endpoint, locked, when the user may change it.
create or replace function lock_webhook(p_user_id uuid, p_webhook_id uuid) returns webhook_endpoints
language plpgsql as $$
declare
  v_endpoint webhook_endpoints;
begin
  select e.* into v_endpoint
  from webhook_endpoints e
  join project_access a on a.project_id = e.project_id and a.user_id = p_user_id
  where e.id = p_webhook_id
  for no key update of e;
  perform assert_webhook_admin(project_role(p_user_id, v_endpoint.project_id), 'webhook');
  return v_endpoint;
end
$$;

create or replace function create_webhook(
  p_user_id uuid, p_project_id uuid, p_url text, p_types text[], out webhook webhook_endpoints,
  out secret text
) language plpgsql as $$
begin
  perform assert_webhook_admin(project_role(p_user_id, p_project_id), 'project');
  -- One at a time for a project, so that the cap is one; each end of a job writes a row for each.
  perform from projects where id = p_project_id for no key update;
  if (select count(*) from webhook_endpoints e where e.project_id = p_project_id) >= 20 then
    raise 'A project has at most 20 webhooks; delete one first.' using errcode = 'BT409';
  end if;
  insert into webhook_endpoints (project_id, url, types)
  values (p_project_id, p_url, p_types)
  on conflict do nothing
  returning * into webhook;
  if webhook.id is null then
    raise 'url: the project already has a webhook with this URL.' using errcode = 'BT409';
  end if;
  secret := add_webhook_secret(p_project_id, webhook.id);
end
$$;

-- Change what is not null. Waiting deliveries go to the new URL, and wait while it is disabled.
create or replace function update_webhook(
  p_user_id uuid, p_webhook_id uuid, p_enabled boolean, p_url text, p_types text[]
) returns webhook_endpoints
language plpgsql as $$
declare
  v_endpoint webhook_endpoints := lock_webhook(p_user_id, p_webhook_id);
begin
  update webhook_endpoints
  set
    url = coalesce(p_url, url), types = coalesce(p_types, types), updated_at = baton_now()
  where id = p_webhook_id;
  update webhook_deliveries
  set url = p_url
  where endpoint_id = p_webhook_id and state = 'waiting' and url <> p_url;
  if v_endpoint.enabled and not p_enabled then
    perform disable_webhook(p_webhook_id, null);
  elsif p_enabled and not v_endpoint.enabled then
    update webhook_endpoints
    set enabled = true, disabled_reason = null, failing_since = null
    where id = p_webhook_id;
    update webhook_deliveries
    set next_attempt_at = baton_now()
    where endpoint_id = p_webhook_id and state = 'waiting' and next_attempt_at is null;
  end if;
  select * into v_endpoint from webhook_endpoints where id = p_webhook_id;
  return v_endpoint;
exception when unique_violation then
  raise 'url: the project already has a webhook with this URL.' using errcode = 'BT409';
end
$$;

-- Delete an endpoint, what waits for it and its log.
create or replace function delete_webhook(p_user_id uuid, p_webhook_id uuid) returns void
language plpgsql as $$
begin
  perform lock_webhook(p_user_id, p_webhook_id);
  delete from webhook_endpoints where id = p_webhook_id;
end
$$;

-- A new secret; both sign for 24 hours. p_webhook_id null is the secret of job.webhook_url.
create or replace function rotate_webhook_secret(
  p_user_id uuid, p_project_id uuid, p_webhook_id uuid
) returns text
language plpgsql as $$
begin
  if p_webhook_id is not null then
    p_project_id := (lock_webhook(p_user_id, p_webhook_id)).project_id;
  else
    perform assert_webhook_admin(project_role(p_user_id, p_project_id), 'project');
    perform from projects where id = p_project_id for no key update;
  end if;
  delete from webhook_secrets
  where project_id = p_project_id and endpoint_id is not distinct from p_webhook_id
    and expires_at < baton_now();
  update webhook_secrets
  set expires_at = baton_now() + interval '24 hours'
  where project_id = p_project_id and endpoint_id is not distinct from p_webhook_id
    and expires_at is null;
  -- Each one is a signature in a header; three of them cover any rotation that makes sense.
  delete from webhook_secrets
  where id in (
    select id from webhook_secrets
    where project_id = p_project_id and endpoint_id is not distinct from p_webhook_id
    order by id desc offset 2);
  return add_webhook_secret(p_project_id, p_webhook_id);
end
$$;

-- The secret that signs messages to job.webhook_url, made when somebody first asks for it.
create or replace function read_webhook_secret(p_user_id uuid, p_project_id uuid) returns text
language plpgsql as $$
declare
  v_secret text;
begin
  perform assert_webhook_admin(project_role(p_user_id, p_project_id), 'project');
  perform add_webhook_secret(p_project_id, null);
  select secret into v_secret
  from webhook_secrets
  where project_id = p_project_id and endpoint_id is null and expires_at is null;
  return v_secret;
end
$$;

-- The log of a message as the API shows it.
create or replace function attempts_of(p_delivery_id text) returns jsonb
language sql stable as $$
  select coalesce(jsonb_agg(jsonb_build_object(
    'at', rfc3339(at), 'status', status, 'ms', ms, 'error', error) order by id), '[]')
  from webhook_attempts
  where delivery_id = p_delivery_id
$$;

-- Send a message once more, with the whole schedule before it and the same id, to where the endpoint
-- is now: what a dead URL has missed is replayed once it has been mended.
create or replace function replay_webhook(p_user_id uuid, p_delivery_id text)
returns webhook_deliveries
language plpgsql as $$
declare
  v_delivery webhook_deliveries;
  v_enabled boolean;
  v_url text;
begin
  select d.* into v_delivery
  from webhook_deliveries d
  join project_access a on a.project_id = d.project_id and a.user_id = p_user_id
  where d.id = p_delivery_id;
  perform assert_webhook_admin(project_role(p_user_id, v_delivery.project_id), 'delivery');
  select enabled, url into v_enabled, v_url
  from webhook_endpoints where id = v_delivery.endpoint_id for no key update;
  if not v_enabled then
    raise 'The webhook is disabled; enable it first.' using errcode = 'BT409';
  end if;
  update webhook_deliveries
  set
    url = coalesce(v_url, url), state = 'waiting', attempt = 0, next_attempt_at = baton_now(),
    ended_at = null
  where id = p_delivery_id
  returning * into v_delivery;
  return v_delivery;
end
$$;

-- --- Digests ------------------------------------------------------------------------------
--
-- A project has at most one schedule: a cron expression in a time zone, whose times are the boundaries
-- between periods. Each minute a worker looks for schedules that are due, and for each stores one job
-- for everything up to the latest boundary, in the transaction that moves the schedule on: so a period
-- has one job, whatever dies in between, and several that an outage let pass have one together.

create table if not exists digest_schedules (
  project_id uuid primary key references projects on delete cascade,
  user_id uuid not null references users,  -- who set it; the digests are asked for in their name
  cron text not null,
  time_zone text not null,  -- of the IANA database
  covered_until timestamptz not null,  -- up to there is written, or asked for: the next period begins
  next_at timestamptz not null,  -- the boundary that ends it
  job_id uuid,  -- of the latest digest; it may be gone
  error text,  -- why none could be asked for at the latest try
  created_at timestamptz not null default baton_now(),
  updated_at timestamptz not null default baton_now(),
  constraint digest_schedules_forward check (next_at > covered_until)
);
create index if not exists digest_schedules_due on digest_schedules (next_at);

-- Where digests are posted. By an integration that whoever set the schedule may post with.
create table if not exists digest_channels (
  project_id uuid not null references digest_schedules on delete cascade,
  integration_id uuid not null references integrations on delete cascade,
  channel_id text not null check (length(channel_id) between 1 and 64),
  primary key (project_id, integration_id, channel_id)
);
create index if not exists digest_channels_integration on digest_channels (integration_id);

create table if not exists chat_messages (
  id uuid primary key default uuidv7(),  -- the same at every attempt, so that a service knows it again
  insight_id uuid not null references insights on delete cascade,  -- what is posted
  project_id uuid not null references projects on delete cascade,
  integration_id uuid not null references integrations on delete cascade,
  channel_id text not null,
  state text not null default 'waiting' check (state in ('waiting', 'posted', 'dead')),
  attempt int not null default 0,  -- attempts made
  -- Due from then on. While an attempt runs this is its lease, and the value is its fence.
  next_attempt_at timestamptz default baton_now(),
  message_id text,  -- as the service calls it
  error text,  -- why the latest attempt failed, in one sentence
  created_at timestamptz not null default baton_now(),
  ended_at timestamptz,
  constraint chat_messages_ended
    check ((state = 'waiting') = (ended_at is null) and (state = 'waiting') = (next_attempt_at is not null)),
  constraint chat_messages_once unique (insight_id, integration_id, channel_id)
);
create index if not exists chat_messages_due on chat_messages (next_attempt_at)
  where next_attempt_at is not null;
create index if not exists chat_messages_of_project on chat_messages (project_id, id);
create index if not exists chat_messages_integration on chat_messages (integration_id);

-- Queues a digest for the channels of its project, in the transaction that stores it. Not for those of
-- who may not read it any more: a user who has left takes no digests along.
create or replace function queue_chat_messages() returns trigger
language plpgsql as $$
begin
  insert into chat_messages (insight_id, project_id, integration_id, channel_id)
  select new.id, new.project_id, c.integration_id, c.channel_id
  from (  -- locked, so that an integration that is being deleted cannot fail the end of a job
    select c.integration_id, c.channel_id
    from digest_channels c
    join integrations i on i.id = c.integration_id
    where c.project_id = new.project_id and i.enabled and case
      when i.organization_id is null then project_role(i.user_id, new.project_id) is not null
      else exists (
        select from projects p
        where p.id = new.project_id and p.organization_id = i.organization_id
      ) or exists (
        select from digest_schedules s
        join members m on m.user_id = s.user_id and m.organization_id = i.organization_id
        where s.project_id = new.project_id
          and project_role(s.user_id, new.project_id) is not null) end
    order by c.integration_id, c.channel_id
    for key share of i
  ) c;
  return null;
end
$$;
create or replace trigger insights_queue_chat_messages after insert on insights for each row
  when (new.kind = 'digest')
  execute function queue_chat_messages();

-- Take what is due, for p_lease_seconds. Answers what an attempt needs; the token is to be decrypted.
create or replace function claim_chat_messages(p_limit int, p_lease_seconds double precision)
returns table (
  id uuid, project_id uuid, source text, workspace_id text, token bytea, channel_id text, title text,
  summary text, markdown text, attempt int, leased_until timestamptz
) language plpgsql as $$
#variable_conflict use_column
begin
  if hold_reason() is not null then
    return;
  end if;
  return query
  with due as (
    select id from chat_messages
    where next_attempt_at <= baton_now()
    order by next_attempt_at
    limit p_limit
    for update skip locked
  ),
  claimed as (
    update chat_messages m
    set next_attempt_at = baton_now() + p_lease_seconds * interval '1 second'
    from due
    where m.id = due.id
    returning m.*
  )
  select
    c.id, c.project_id, i.source, nullif(i.workspace_id, ''),
    case when i.enabled then read_integration_token(i.id) end, c.channel_id, a.title, a.summary,
    a.markdown, c.attempt + 1, c.next_attempt_at
  from claimed c
  join integrations i on i.id = c.integration_id
  join insights a on a.id = c.insight_id;
end
$$;

-- Note an attempt: without an error it is posted; without p_retry_seconds, or when that would be more
-- than a day after the digest, it is dead; else it is due again later. A lease that has run out means
-- that another attempt decides, unless this one has succeeded. Answers the state, or null when this
-- attempt decides nothing.
create or replace function chat_attempted(
  p_id uuid, p_leased_until timestamptz, p_message_id text, p_error text,
  p_retry_seconds double precision
) returns text
language sql as $$
  update chat_messages m
  set
    attempt = attempt + 1, message_id = p_message_id, error = p_error, state = v.state,
    next_attempt_at = case v.state
      when 'waiting' then baton_now() + p_retry_seconds * interval '1 second' end,
    ended_at = case when v.state <> 'waiting' then baton_now() end
  from (
    select id, case
      when p_error is null then 'posted'
      when baton_now() + p_retry_seconds * interval '1 second' < created_at + interval '1 day'
        then 'waiting'
      else 'dead' end as state
    from chat_messages where id = p_id
  ) v
  where m.id = v.id and m.state = 'waiting'
    and (next_attempt_at = p_leased_until or p_error is null)
  returning m.state
$$;

-- Give a claimed message back at once, because the worker stops.
create or replace function release_chat_message(p_id uuid, p_leased_until timestamptz) returns void
language sql as $$
  update chat_messages set next_attempt_at = baton_now()
  where id = p_id and next_attempt_at = p_leased_until
$$;

-- The numbers that a field of a cron expression stands for: *, 5, 1-5, */2, 8-18/2, names, and lists
-- of them. Null: it is no such field.
create or replace function cron_values(
  p_field text, p_low int, p_high int, p_names text[] default '{}'
) returns int[]
language plpgsql immutable as $$
declare
  v_field text := lower(p_field);
  v_part text;
  v_found text[];
  v_from int;
  v_to int;
  v_values int[] := '{}';
begin
  for n in 1 .. cardinality(p_names) loop
    v_field := regexp_replace(v_field, '\m' || p_names[n] || '\M', (n - 1 + p_low)::text, 'g');
  end loop;
  foreach v_part in array string_to_array(v_field, ',') loop
    v_found := regexp_match(
      v_part, '^(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?$');
    v_from := coalesce(v_found[1]::int, p_low);
    v_to := coalesce(v_found[2]::int, case when v_found[1] is null then p_high else v_from end);
    if v_found is null or v_from < p_low or v_to > p_high or v_to < v_from
      or v_found[3]::int = 0 or (v_found[3] is not null and v_part ~ '^[0-9]+/') then
      return null;
    end if;
    v_values := v_values
      || array(select generate_series(v_from, v_to, coalesce(v_found[3]::int, 1)));
  end loop;
  return v_values;
end
$$;

-- A cron expression as numbers; null: it is none. The minute is one number, so that its times are at
-- least an hour apart. As crontab(5) has it, a day has to fit both its fields, or one of them when
-- neither begins with a star.
create or replace function cron_fields(
  p_cron text, out minute int, out hours int[], out days int[], out months int[],
  out weekdays int[], out either boolean
) language plpgsql immutable as $$
declare
  v_fields text[] := regexp_split_to_array(btrim(p_cron), '\s+');
begin
  if cardinality(v_fields) <> 5 or v_fields[1] !~ '^[0-5]?[0-9]$' then
    return;
  end if;
  minute := v_fields[1];
  hours := cron_values(v_fields[2], 0, 23);
  days := cron_values(v_fields[3], 1, 31);
  months := cron_values(v_fields[4], 1, 12,
    '{jan, feb, mar, apr, may, jun, jul, aug, sep, oct, nov, dec}');
  weekdays := array(  -- 0 and 7 are both Sunday
    select v % 7
    from unnest(cron_values(v_fields[5], 0, 7, '{sun, mon, tue, wed, thu, fri, sat}')) v);
  either := v_fields[3] !~ '^\*' and v_fields[5] !~ '^\*';
  if hours is null or days is null or months is null or weekdays = '{}' then
    minute := null;
  end if;
end
$$;

-- The times that a cron expression stands for, of the days from p_from to p_to. A local time that the
-- clocks skip is as much later as they are put forward; one that they show twice counts once, the
-- second time.
create or replace function cron_times(p_cron text, p_time_zone text, p_from date, p_to date)
returns setof timestamptz
language sql stable as $$
  select distinct (day + make_interval(hours => hour, mins => f.minute)) at time zone p_time_zone
  from cron_fields(p_cron) f
  cross join generate_series(p_from::timestamp, p_to::timestamp, interval '1 day') day
  cross join unnest(f.hours) hour
  where extract(month from day) = any (f.months) and case
    when f.either
      then extract(day from day) = any (f.days) or extract(dow from day) = any (f.weekdays)
    else extract(day from day) = any (f.days) and extract(dow from day) = any (f.weekdays) end
$$;

-- The first of these times after p_at; null: there is none. The 29th of February can be eight years
-- away, everything else is in the first few weeks mostly.
create or replace function cron_after(p_cron text, p_time_zone text, p_at timestamptz)
returns timestamptz
language sql stable as $$
  select coalesce(
    (select min(t) from cron_times(p_cron, p_time_zone, today - 1, today + 40) t where t > p_at),
    (select min(t) from cron_times(p_cron, p_time_zone, today + 40, today + 3000) t))
  from (select (p_at at time zone p_time_zone)::date as today) d
$$;

-- The last of these times that is not after p_at.
create or replace function cron_before(p_cron text, p_time_zone text, p_at timestamptz)
returns timestamptz
language sql stable as $$
  select coalesce(
    (select max(t) from cron_times(p_cron, p_time_zone, today - 40, today + 1) t where t <= p_at),
    (select max(t) from cron_times(p_cron, p_time_zone, today - 3000, today - 40) t))
  from (select (p_at at time zone p_time_zone)::date as today) d
$$;

-- Set or change the schedule of a project. The first period begins at the boundary before now, so that
-- the first digest is about as much time as the later ones; a change begins none anew. p_deliver is a
-- list of {"integration_id", "channel_id"}: where the user may post; null leaves what is there.
create or replace function put_digest_schedule(
  p_user_id uuid, p_project_id uuid, p_cron text, p_time_zone text, p_deliver jsonb
) returns digest_schedules
language plpgsql as $$
declare
  v_schedule digest_schedules;
  v_time_zone text;
  v_channel jsonb;
begin
  if p_cron is null or (cron_fields(p_cron)).minute is null or length(p_cron) > 200 then
    raise 'cron: must be five fields such as 0 9 * * 1-5 (minute, hour, day of the month, month, day '
      'of the week) with one number as the minute: a digest comes at most once an hour.'
      using errcode = 'BT400';
  end if;
  select name into v_time_zone from pg_timezone_names where lower(name) = lower(p_time_zone) limit 1;
  if not found then
    raise 'time_zone: there is no time zone named "%"; name one such as Europe/Berlin, or UTC.',
      left(p_time_zone, 100) using errcode = 'BT400';
  end if;
  if cron_after(p_cron, v_time_zone, baton_now()) is null then
    raise 'cron: there is no day like this.' using errcode = 'BT400';
  end if;
  insert into digest_schedules as d (
    project_id, user_id, cron, time_zone, covered_until, next_at)
  values (
    p_project_id, p_user_id, regexp_replace(btrim(p_cron), '\s+', ' ', 'g'), v_time_zone,
    cron_before(p_cron, v_time_zone, baton_now()), cron_after(p_cron, v_time_zone, baton_now()))
  on conflict (project_id) do update
  set user_id = excluded.user_id, cron = excluded.cron, time_zone = excluded.time_zone,
    next_at = excluded.next_at, error = null, updated_at = baton_now()
  returning * into v_schedule;
  if p_deliver is null then
    return v_schedule;
  elsif jsonb_typeof(p_deliver) <> 'array' or jsonb_array_length(p_deliver) > 10 then
    raise 'deliver: must be a list of at most 10 objects with integration_id and channel_id.'
      using errcode = 'BT400';
  end if;
  delete from digest_channels where project_id = p_project_id;
  for v_channel in select * from jsonb_array_elements(p_deliver) loop
    if not exists (
      select from integrations i
      join chat_accounts(p_user_id, i.source) a on a.integration_id = i.id
      where i.id::text = v_channel ->> 'integration_id' and i.source in ('discord', 'slack')) then
      raise 'deliver: none of the integrations of Discord and Slack with which one may post in the '
        'name of this schedule has the integration_id %.', left(v_channel ->> 'integration_id', 100)
        using errcode = 'BT404';
    elsif v_channel ->> 'channel_id' is null or length(v_channel ->> 'channel_id') not between 1 and 64
    then
      raise 'deliver: channel_id must be the id of a channel, as the service has it.'
        using errcode = 'BT400';
    end if;
    insert into digest_channels (project_id, integration_id, channel_id)
    values (p_project_id, (v_channel ->> 'integration_id')::uuid, v_channel ->> 'channel_id')
    on conflict do nothing;
  end loop;
  return v_schedule;
end
$$;

-- Answers BT404 or BT403 unless the user may change the schedule of the project.
create or replace function assert_digest_admin(p_user_id uuid, p_project_id uuid) returns void
language plpgsql stable as $$
begin
  perform assert_project(p_user_id, p_project_id);
  if project_role(p_user_id, p_project_id) = 'member' then
    raise 'Only an owner or admin of the project may change when its digests are written.'
      using errcode = 'BT403';
  end if;
end
$$;

create or replace function set_digest_schedule(
  p_user_id uuid, p_project_id uuid, p_cron text, p_time_zone text, p_deliver jsonb
) returns digest_schedules
language plpgsql as $$
begin
  perform assert_digest_admin(p_user_id, p_project_id);
  return put_digest_schedule(p_user_id, p_project_id, p_cron, p_time_zone, p_deliver);
end
$$;

create or replace function delete_digest_schedule(p_user_id uuid, p_project_id uuid) returns void
language plpgsql as $$
begin
  perform assert_digest_admin(p_user_id, p_project_id);
  delete from digest_schedules where project_id = p_project_id;
end
$$;

-- Where the period of a schedule's next digest begins: where the last one ended; or where that began,
-- if it failed for a reason that lies outside the period, so that what it should have told is told
-- once more, but no more than a month of it. One that was cancelled, or about which there was nothing
-- to say, is over.
create or replace function digest_since(p_schedule digest_schedules, p_until timestamptz)
returns timestamptz
language sql stable as $$
  select coalesce(
    (select least(p_schedule.covered_until, greatest(
       (j.input -> 'options' ->> 'since')::timestamptz, p_until - interval '31 days'))
     from jobs j
     where j.id = p_schedule.job_id and j.status = 'failed'
       and j.error_code not in ('no_result', 'cancelled')),
    p_schedule.covered_until)
$$;

-- Ask for the digest of one schedule that is due, for all that happened up to the latest boundary, and
-- move the schedule on. Answers its project, or null: none is due. A schedule for which that is refused
-- is tried again in an hour and says why, so that it is not in the way of the others.
create or replace function submit_digest() returns uuid
language plpgsql as $$
declare
  v_schedule digest_schedules;
  v_until timestamptz;
  v_job_id uuid;
begin
  if hold_reason() is not null then
    return null;
  end if;
  select * into v_schedule
  from digest_schedules
  where next_at <= baton_now()
  order by next_at
  limit 1
  for update skip locked;
  if not found then
    return null;
  end if;
  begin
    v_until := cron_before(v_schedule.cron, v_schedule.time_zone, baton_now());
    if v_until > v_schedule.covered_until then
      select (s.job).id into v_job_id
      from submit_job(
        case when project_role(v_schedule.user_id, v_schedule.project_id) is not null
          then v_schedule.user_id  -- who may have left the organization
          else (select owner_id from projects where id = v_schedule.project_id) end,
        v_schedule.project_id, 'digest', null, null, v_until,
        jsonb_build_object('since', rfc3339(digest_since(v_schedule, v_until)))) s;
    end if;
    update digest_schedules
    set covered_until = greatest(covered_until, v_until), job_id = coalesce(v_job_id, job_id),
      next_at = cron_after(cron, time_zone, baton_now()), error = null, updated_at = baton_now()
    where project_id = v_schedule.project_id;
  exception when sqlstate 'BT400' or sqlstate 'BT404' or invalid_parameter_value then
    update digest_schedules
    set next_at = baton_now() + interval '1 hour', error = left(sqlerrm, 1000),
      updated_at = baton_now()
    where project_id = v_schedule.project_id;
  end;
  return v_schedule.project_id;
end
$$;

-- --- ops: what an operator does, from psql -------------------------------------------------

create schema if not exists ops;
comment on schema ops is
  'What an operator does day to day. Start with: select * from ops.health; and select * from ops.help;';

create table if not exists ops.audit (
  id bigint generated always as identity primary key,
  at timestamptz not null default baton_now(),
  who text not null default session_user,  -- the login, whatever role it has taken on
  application text not null default current_setting('application_name'),
  what text not null,  -- the function of ops that was called
  detail jsonb not null default '{}'  -- its arguments and what came of them; never a secret
);
create index if not exists audit_recent on ops.audit (at);
comment on table ops.audit is
  'What operators did, newest last: who called which function of ops, when, with what, and what came '
  'of it. Ask: select * from ops.audit order by id desc limit 20;';

-- Every function of ops that changes something ends with this. By the server's clock, which no session
-- can move: what is dated back, retention would remove at once.
create or replace function audit(p_what text, p_detail jsonb default '{}') returns void
language sql as $$
  insert into ops.audit (at, what, detail) values (now(), p_what, p_detail)
$$;

-- --- ops: people, plans and limits --------------------------------------------------------

-- A slug from a name; names without a Latin letter or digit become "project".
create or replace function slug_of(p_name text) returns text
language sql immutable as $$
  select coalesce(
    nullif(trim(both '-' from regexp_replace(lower(p_name), '[^a-z0-9]+', '-', 'g')), ''),
    'project')
$$;

create or replace function assert_user(p_user_id uuid, p_argument text default 'user_id') returns void
language plpgsql stable as $$
begin
  perform from users where id = p_user_id;
  if not found then
    raise '%: there is no user with this id.', p_argument using errcode = 'BT404';
  end if;
end
$$;

-- Answers BT400 unless there is a text, of p_max characters at most.
create or replace function assert_text(p_argument text, p_text text, p_max int default 300)
returns void
language plpgsql immutable as $$
begin
  if coalesce(length(trim(p_text)), 0) = 0 or length(p_text) > p_max then
    raise '%: must have 1 to % characters.', p_argument, p_max using errcode = 'BT400';
  end if;
end
$$;

create or replace function assert_plan(p_plan text) returns void
language plpgsql stable as $$
begin
  if not exists (select from plans p where p.name = p_plan) then
    raise 'plan: there is no plan named "%"; make it with ops.create_plan.', p_plan
      using errcode = 'BT400';
  end if;
end
$$;

create or replace function ops.create_user(
  email text, name text default null, plan text default 'self_hosted'
) returns uuid
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_id uuid;
begin
  if email !~ '^[^@[:space:]]+@[^@[:space:]]+$' or email is null or length(email) > 320 then
    raise 'email: must be an address such as ada@example.com.' using errcode = 'BT400';
  end if;
  name := coalesce(name, left(split_part(email, '@', 1), 300));
  perform assert_text('name', name);
  perform assert_plan(plan);
  insert into users (email, name, plan)
  values (create_user.email, create_user.name, create_user.plan)
  on conflict do nothing
  returning id into v_id;
  if v_id is null then
    raise 'email: there is already a user with this address.' using errcode = 'BT400';
  end if;
  perform audit('create_user', jsonb_build_object('user_id', v_id, 'email', email, 'plan', plan));
  return v_id;
end
$$;
comment on function ops.create_user is
  'Create a user and answer its id. Fails when the e-mail address is taken.';

create or replace function ops.create_organization(name text, slug text default null) returns uuid
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_id uuid;
begin
  perform assert_text('name', name);
  slug := coalesce(slug, slug_of(name));
  if slug !~ '^[a-z0-9]+(-[a-z0-9]+)*$' then
    raise 'slug: must be lower case letters, digits and single hyphens between them.'
      using errcode = 'BT400';
  end if;
  insert into organizations (name, slug)
  values (create_organization.name, create_organization.slug)
  on conflict do nothing
  returning id into v_id;
  if v_id is null then
    raise 'slug: there is already an organization "%"; give another slug.', slug
      using errcode = 'BT400';
  end if;
  perform audit('create_organization', jsonb_build_object('organization_id', v_id, 'slug', slug));
  return v_id;
end
$$;
comment on function ops.create_organization is
  'Create an organization and answer its id. The slug is made from the name unless given.';

create or replace function ops.add_member(
  organization uuid, member uuid, role text default 'member', admin_until timestamptz default null
) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  if not exists (select from organizations where id = organization) then
    raise 'organization: there is no organization with this id.' using errcode = 'BT404';
  end if;
  perform assert_user(member, 'member');
  if role not in ('admin', 'member') or role is null then
    raise 'role: must be admin or member.' using errcode = 'BT400';
  end if;
  insert into members (organization_id, user_id, role, admin_until)
  values (organization, member, add_member.role, add_member.admin_until)
  on conflict (organization_id, user_id) do update
  set role = excluded.role, admin_until = excluded.admin_until;
  perform audit('add_member', jsonb_build_object(
    'organization_id', organization, 'user_id', member, 'role', role, 'admin_until', admin_until));
end
$$;
comment on function ops.add_member is
  'Add a user to an organization as admin or member, or change the role. '
  'A member with admin_until is an admin until that time.';

create or replace function ops.create_project(
  name text, owner uuid, organization uuid default null
) returns uuid
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_base text := slug_of(create_project.name);
  v_slug text;
  v_id uuid;
begin
  perform assert_text('name', create_project.name);
  perform assert_user(owner, 'owner');
  if organization is not null then
    if not exists (select from organizations where id = organization) then
      raise 'organization: there is no organization with this id.' using errcode = 'BT404';
    end if;
    perform from members m where m.organization_id = organization and m.user_id = owner;
    if not found then
      raise 'owner: the user is no member of the organization.' using errcode = 'BT400';
    end if;
  end if;
  -- Serialises makers of projects of one owner or organization, so that a free slug stays free.
  perform pg_advisory_xact_lock(hashtextextended(coalesce(organization, owner)::text, 0));
  select candidate into v_slug
  from generate_series(1, 10000) as n,
    lateral (select case n when 1 then v_base else v_base || '-' || n end) as c (candidate)
  where not exists (
    select from projects p
    where p.slug = candidate and p.organization_id is not distinct from organization
      and (organization is not null or p.owner_id = owner))
  order by n
  limit 1;
  if v_slug is null then
    raise 'name: there are too many projects of this name; give another one.' using errcode = 'BT400';
  end if;
  insert into projects (name, slug, owner_id, organization_id)
  values (create_project.name, v_slug, owner, organization)
  returning id into v_id;
  perform audit('create_project', jsonb_build_object(
    'project_id', v_id, 'owner', owner, 'organization_id', organization));
  return v_id;
end
$$;
comment on function ops.create_project is
  'Create a project and answer its id: personal, or of an organization that the owner is in.';

create or replace function ops.create_api_key(user_id uuid, label text default '') returns text
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_secret bytea;
  v_key text;
begin
  perform assert_user(create_api_key.user_id);
  if length(label) > 300 or label is null then
    raise 'label: must have at most 300 characters.' using errcode = 'BT400';
  end if;
  loop  -- the first 11 characters tell one key from another, and in the end some come twice
    -- Four random UUIDs hold 488 random bits; their SHA-256 is 32 bytes that nobody can predict.
    v_secret := sha256(
      uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
      || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));
    v_key := 'fr_' || rtrim(translate(encode(v_secret, 'base64'), '+/', '-_'), '=');
    insert into api_keys (user_id, label, prefix, digest)
    values (
      create_api_key.user_id, create_api_key.label, left(v_key, 11),
      sha256(convert_to(v_key, 'UTF8')))
    on conflict do nothing;
    exit when found;
  end loop;
  perform audit('create_api_key', jsonb_build_object(
    'user_id', create_api_key.user_id, 'label', label, 'prefix', left(v_key, 11)));
  return v_key;
end
$$;
comment on function ops.create_api_key is
  'Make an API key for a user and answer it. This is the only time it can be seen: '
  'only its SHA-256 is stored.';

create or replace function ops.revoke_api_key(prefix text) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_user_id uuid;
begin
  if length(prefix) < 11 or left(prefix, 3) <> 'fr_' or prefix is null then
    raise 'prefix: must be the first 11 characters of a key, beginning with fr_.'
      using errcode = 'BT400';
  end if;
  update api_keys k
  set revoked_at = baton_now()
  where k.prefix = left(revoke_api_key.prefix, 11) and k.revoked_at is null
  returning user_id into v_user_id;
  if not found then
    return false;
  end if;
  perform audit('revoke_api_key', jsonb_build_object(
    'prefix', left(prefix, 11), 'user_id', v_user_id));
  return true;
end
$$;
comment on function ops.revoke_api_key is
  'Revoke the key that starts with this prefix (11 characters); what is held open with it ends within '
  'two seconds. False: no such live key. When a key has leaked.';

create or replace function ops.revoke_user_keys(user_id uuid) returns bigint
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_count bigint;
begin
  perform assert_user(revoke_user_keys.user_id);
  update api_keys k
  set revoked_at = baton_now()
  where k.user_id = revoke_user_keys.user_id and k.revoked_at is null;
  get diagnostics v_count = row_count;
  perform audit('revoke_user_keys', jsonb_build_object(
    'user_id', revoke_user_keys.user_id, 'revoked', v_count));
  return v_count;
end
$$;
comment on function ops.revoke_user_keys is
  'Revoke all keys of a user and answer how many there were; as ops.revoke_api_key. When a laptop is '
  'lost, or a user has left.';

create or replace function ops.create_plan(
  name text, monthly_credits int default null, overage boolean default false,
  flows text[] default null, models text[] default null
) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_wrong text := (select f from unnest(flows) f where f not in (select kind from public.flows) limit 1);
begin
  perform assert_text('name', create_plan.name);
  if monthly_credits < 0 then
    raise 'monthly_credits: must be 0 or more; null is no limit.' using errcode = 'BT400';
  elsif overage is null then
    raise 'overage: must be true or false.' using errcode = 'BT400';
  elsif v_wrong is not null then
    raise 'flows: there is no job kind named "%".', v_wrong using errcode = 'BT400';
  end if;
  insert into plans (name, monthly_credits, overage, flows, models)
  values (create_plan.name, create_plan.monthly_credits, create_plan.overage, create_plan.flows,
    create_plan.models)
  on conflict on constraint plans_pkey do update
  set monthly_credits = excluded.monthly_credits, overage = excluded.overage,
    flows = excluded.flows, models = excluded.models;
  perform audit('create_plan', jsonb_build_object(
    'name', create_plan.name, 'monthly_credits', create_plan.monthly_credits,
    'overage', create_plan.overage, 'flows', create_plan.flows, 'models', create_plan.models));
end
$$;
comment on function ops.create_plan is
  'Create a plan, or change it for all who have it. monthly_credits null: no limit; overage: go on, '
  'and charge, when they are used up; flows: job kinds, models: as BATON_MODEL names them, null: all. '
  'Jobs that have been accepted run under what was true then.';

create or replace function ops.set_plan(user_id uuid, plan text) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_plan(set_plan.plan);
  perform assert_user(set_plan.user_id);
  update users u set plan = set_plan.plan where u.id = set_plan.user_id;
  perform audit('set_plan', jsonb_build_object(
    'user_id', set_plan.user_id, 'plan', set_plan.plan));
end
$$;
comment on function ops.set_plan is
  'Give a user another plan, from the next request on. It counts for all projects that the user '
  'owns, those of organizations included. What has been used this month stays used.';

create or replace function ops.add_credits(user_id uuid, credits int, reason text) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_user(add_credits.user_id);
  if credits = 0 or credits is null then
    raise 'credits: must be a number other than 0.' using errcode = 'BT400';
  end if;
  perform assert_text('reason', reason);
  insert into credit_grants (user_id, credits, reason)
  values (add_credits.user_id, add_credits.credits, add_credits.reason);
  perform audit('add_credits', jsonb_build_object(
    'user_id', add_credits.user_id, 'credits', add_credits.credits, 'reason', add_credits.reason));
end
$$;
comment on function ops.add_credits is
  'Give a user credits beside those of the plan; they are used after them and do not lapse. '
  'Below 0: a correction.';

create or replace function ops.set_price(
  model text, prompt numeric, completion numeric
) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_text('model', model);
  if prompt not between 0 and 1000000000 or prompt is null then
    raise 'prompt: must be 0 or more, for a million tokens, and at most 1000000000.'
      using errcode = 'BT400';
  elsif completion not between 0 and 1000000000 or completion is null then
    raise 'completion: must be 0 or more, for a million tokens, and at most 1000000000.'
      using errcode = 'BT400';
  end if;
  insert into model_prices (model, prompt, completion)
  values (set_price.model, set_price.prompt, set_price.completion)
  on conflict on constraint model_prices_pkey do update
  set prompt = excluded.prompt, completion = excluded.completion;
  perform audit('set_price', jsonb_build_object(
    'model', model, 'prompt', prompt, 'completion', completion));
end
$$;
comment on function ops.set_price is
  'Say what a million tokens of a model cost, in any currency, for the calls from now on.';

create or replace function ops.set_kind_credits(kind text, credits int) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_kind(kind);
  if credits is null or credits not between 0 and 1000000 then
    raise 'credits: must be 0 to 1000000.' using errcode = 'BT400';
  end if;
  update flows f set credits = set_kind_credits.credits where f.kind = set_kind_credits.kind;
  perform audit('set_kind_credits', jsonb_build_object('kind', kind, 'credits', credits));
end
$$;
comment on function ops.set_kind_credits is
  'Say what an artifact of a kind costs, in credits, for the jobs that are asked for from now on.';

-- As a function it is known when a statement is planned, so that the little that is left is expected.
create or replace function usage_counted_until() returns timestamptz
language sql stable security definer set search_path = public, pg_temp as $$
  select coalesce((select until from usage_counted), '-infinity')
$$;

-- usage_by_day of the last 92 days, and what it lacks.
create or replace view usage_lately as
select
  day, user_id, project_id, payer_id, completed_jobs, credits, from_grants, calls, prompt_tokens,
  completion_tokens, cost
from usage_by_day
where day > (baton_now() at time zone 'UTC')::date - 92
union all
select (created_at at time zone 'UTC')::date, user_id, project_id, payer_id, count(*), sum(credits),
  sum(from_grants), 0, 0, 0, null
from charges
where created_at >= usage_counted_until()
group by 1, user_id, project_id, payer_id
union all
select (created_at at time zone 'UTC')::date, user_id, project_id, null, 0, 0, 0, count(*),
  sum(prompt_tokens), sum(completion_tokens), sum(cost)
from provider_calls
where created_at >= usage_counted_until()
group by 1, user_id, project_id;

-- The view balances for all at once. Of charges it reads none that have been counted but those that
-- grants paid.
create or replace view ops.balances as
select
  u.id as user_id, u.email, u.plan, p.monthly_credits, p.overage,
  coalesce(charged.credits, 0)::bigint as used, coalesce(reserved.credits, 0)::bigint as reserved,
  grants.left as grants_left,
  case when p.monthly_credits is not null then grants.left + greatest(0,
    p.monthly_credits - coalesce(charged.of_month, 0) - coalesce(reserved.of_month, 0))::bigint
  end as remaining,
  month_of(month_of(baton_now()) + interval '32 days') as resets_at
from users u
join plans p on p.name = u.plan
left join (
  select payer_id, sum(credits) as credits, sum(credits - from_grants) as of_month
  from usage_lately
  where payer_id is not null and day >= (month_of(baton_now()) at time zone 'UTC')::date
  group by payer_id
) charged on charged.payer_id = u.id
left join (
  select payer_id, sum(from_grants) as credits from charges where from_grants > 0 group by payer_id
) spent on spent.payer_id = u.id
left join (
  select o.owner_id, sum(j.credits) as credits, sum(j.from_grants) as from_grants,
    sum(j.credits - j.from_grants) as of_month
  from (
    select project_id, sum(credits) as credits, sum(from_grants) as from_grants
    from jobs
    where status in ('pending', 'processing')
    group by project_id
  ) j
  join projects o on o.id = j.project_id
  group by o.owner_id
) reserved on reserved.owner_id = u.id
left join (
  select user_id, sum(credits) as credits from credit_grants group by user_id
) granted on granted.user_id = u.id
cross join lateral (
  select greatest(0, coalesce(granted.credits, 0) - coalesce(spent.credits, 0)
    - coalesce(reserved.from_grants, 0))::bigint as left
) grants;
comment on view ops.balances is
  'Credits by user, for the projects that the user owns: charged this month (UTC), reserved by jobs '
  'that have not ended, left of ops.add_credits, and remaining for new jobs (null: no limit).';

create or replace view ops.usage as
select
  used.day, used.user_id, u.email, used.project_id, o.name as project, used.completed_jobs,
  used.credits, used.calls, used.prompt_tokens, used.completion_tokens, used.cost
from (
  select day, user_id, project_id,
    sum(completed_jobs)::bigint as completed_jobs, sum(credits)::bigint as credits,
    sum(calls)::bigint as calls, sum(prompt_tokens)::bigint as prompt_tokens,
    sum(completion_tokens)::bigint as completion_tokens, sum(cost) as cost
  from usage_lately
  group by day, user_id, project_id
) used
left join users u on u.id = used.user_id
left join projects o on o.id = used.project_id;
comment on view ops.usage is
  'By day (UTC) of the last 92, user who asked, and project: jobs completed, credits charged, calls of '
  'models, their tokens, and what they cost by ops.set_price (null: not known). What is older is in '
  'usage_by_day.';

create or replace function ops.set_limit(user_id uuid, policy text, quota int) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_user(set_limit.user_id);
  if policy not in ('default', 'poll', 'generate', 'waits') or policy is null then
    raise 'policy: must be default, poll, generate or waits.' using errcode = 'BT400';
  elsif quota not between 0 and 1000000 then
    raise 'quota: must be 0 to 1000000; 0 is no limit, null is what BATON_LIMITS says.'
      using errcode = 'BT400';
  end if;
  if quota is null then
    delete from limits l where l.user_id = set_limit.user_id and l.policy = set_limit.policy;
  else
    insert into limits (user_id, policy, quota)
    values (set_limit.user_id, set_limit.policy, set_limit.quota)
    on conflict on constraint limits_pkey do update set quota = excluded.quota;
  end if;
  perform audit('set_limit', jsonb_build_object(
    'user_id', set_limit.user_id, 'policy', set_limit.policy, 'quota', set_limit.quota));
end
$$;
comment on function ops.set_limit is
  'Give a user a quota of their own, from the next request on. policy: default, poll (a minute and '
  'key), generate (a minute), waits (at once). 0: no limit; null: as BATON_LIMITS says.';

-- --- ops: act -----------------------------------------------------------------------------

-- The job, locked; BT404 when there is none.
create or replace function lock_job(p_job_id uuid) returns jobs
language plpgsql as $$
declare
  v_job jobs;
begin
  select * into v_job from jobs where id = p_job_id for update;
  if not found then
    raise 'id: there is no job with this id.' using errcode = 'BT404';
  end if;
  return v_job;
end
$$;

create or replace function assert_kind(p_kind text) returns void
language plpgsql stable as $$
begin
  if not exists (select from flows where kind = p_kind) then
    raise 'kind: there is no job kind named "%".', p_kind using errcode = 'BT400';
  end if;
end
$$;

-- Answers BT400 unless an operator's batch has a size that leaves the service room.
create or replace function assert_batch(p_max int) returns void
language plpgsql immutable as $$
begin
  if p_max not between 1 and 10000 or p_max is null then
    raise 'max: must be 1 to 10000; call again for more.' using errcode = 'BT400';
  end if;
end
$$;

create or replace function assert_project_id(p_project_id uuid) returns void
language plpgsql stable as $$
begin
  if not exists (select from projects p where p.id = p_project_id) then
    raise 'project_id: there is no project with this id.' using errcode = 'BT404';
  end if;
end
$$;

-- End an unfinished job as the operator, and tell the worker and those who wait for it. The channels
-- are those of app/queue.py. Called under the job's lock.
create or replace function cancel_as_operator(p_job jobs, p_reason text) returns void
language plpgsql as $$
begin
  perform end_job(
    p_job, null, 'cancelled', 'cancelled',
    format('Cancelled by the operator: %s.', rtrim(p_reason, '. ')),
    jsonb_build_object('retryable', true, 'attempts', p_job.attempt,
      'stage', case p_job.status when 'pending' then 'queued' else 'generating' end));
  if p_job.status = 'processing' then
    perform pg_notify('procrastinate_queue_v1#jobs', json_build_object(
      'type', 'abort_job_requested', 'job_id', p_job.ticket_id)::text);
  end if;
  perform pg_notify('baton_jobs', p_job.id::text);
end
$$;

create or replace function ops.retry_job(id uuid) returns uuid
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_job jobs := lock_job(retry_job.id);
  v_new uuid := uuidv7();
begin
  if v_job.status <> 'failed' then
    raise 'id: the job is %; only a failed one can be tried again.', v_job.status
      using errcode = 'BT409';
  end if;
  perform store_retry(v_new, v_job.user_id, v_job);
  perform audit('retry_job', jsonb_build_object('job_id', v_job.id, 'new_job_id', v_new));
  return v_new;
end
$$;
comment on function ops.retry_job is
  'Make a new job of a failed one, for its user, and answer the new id; the plan and its credits apply, '
  'limits of requests do not. When what made one job fail has been mended.';

create or replace function ops.retry_failed(
  error_code text, since interval default '24 hours', max int default 1000,
  kind text default null
) returns int
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
#variable_conflict use_column
declare
  v_job jobs;
  v_until timestamptz;
  v_count int := 0;
begin
  if retry_failed.error_code not in (
    'plan_violation', 'quota_exceeded', 'generation_failed', 'no_result', 'cancelled', 'timeout',
    'worker_lost') or retry_failed.error_code is null then
    raise 'error_code: there is no error code "%".', retry_failed.error_code using errcode = 'BT400';
  elsif retry_failed.since <= interval '0' or retry_failed.since > interval '100 years'
    or retry_failed.since is null then
    raise 'since: must be a time to look back, such as 2 hours, of 100 years at most.'
      using errcode = 'BT400';
  end if;
  perform assert_batch(retry_failed.max);
  if retry_failed.kind is not null then
    perform assert_kind(retry_failed.kind);
  end if;
  -- Two calls take turns, or both would find the same jobs.
  perform pg_advisory_xact_lock(hashtextextended('baton retry failed', 0));
  v_until := clock_timestamp() + interval '1 second';
  for v_job in
    select j.*
    from jobs j
    where j.status = 'failed' and j.error_code = retry_failed.error_code
      and j.completed_at > baton_now() - retry_failed.since
      and (retry_failed.kind is null or j.kind = retry_failed.kind)
      and not exists (select from jobs r where r.retry_of = j.id)
    order by j.completed_at
    limit retry_failed.max
    for key share of j skip locked
  loop
    perform store_retry(uuidv7(), v_job.user_id, v_job);
    v_count := v_count + 1;
    -- Until the commit, who asks for a job of the same credits, or of a project with a limit, waits.
    exit when clock_timestamp() > v_until;
  end loop;
  perform audit('retry_failed', jsonb_build_object(
    'error_code', retry_failed.error_code, 'since', retry_failed.since, 'max', retry_failed.max,
    'kind', retry_failed.kind, 'retried', v_count));
  return v_count;
end
$$;
comment on function ops.retry_failed is
  'Retry the jobs that failed with this error_code in the last 24 hours (since), the oldest first, at '
  'most 1000 (max) and as many as a second allows, of one kind or of all; those that have been retried '
  'are left out: call it again until it answers 0. Answers how many. After an outage of the provider.';

create or replace function ops.cancel_job(id uuid, reason text) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_job jobs;
begin
  perform assert_text('reason', reason);
  v_job := lock_job(cancel_job.id);
  if v_job.status not in ('pending', 'processing') then
    return false;
  end if;
  perform cancel_as_operator(v_job, reason);
  perform audit('cancel_job', jsonb_build_object('job_id', v_job.id, 'reason', reason));
  return true;
end
$$;
comment on function ops.cancel_job is
  'End a job that waits or runs; its client reads the reason, and nothing is charged. False: it had '
  'ended already. For a job that does harm or that nobody wants.';

create or replace function ops.cancel_project(
  id uuid, reason text default 'the jobs of this project were cancelled', max int default 1000
) returns int
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
#variable_conflict use_column
declare
  v_id uuid;
  v_count int := 0;
begin
  perform assert_project_id(cancel_project.id);
  perform assert_text('reason', cancel_project.reason);
  perform assert_batch(cancel_project.max);
  -- Those that wait come first, so that none of them starts in the place of one that runs.
  for v_id in
    select j.id
    from jobs j
    where j.project_id = cancel_project.id and j.status in ('pending', 'processing')
    order by j.status, j.created_at, j.id
    limit cancel_project.max
    for update skip locked
  loop
    perform cancel_as_operator(lock_job(v_id), cancel_project.reason);
    v_count := v_count + 1;
  end loop;
  perform audit('cancel_project', jsonb_build_object(
    'project_id', cancel_project.id, 'reason', cancel_project.reason, 'max', cancel_project.max,
    'cancelled', v_count));
  return v_count;
end
$$;
comment on function ops.cancel_project is
  'End the jobs of a project that wait or run, at most 1000 (max) of them, and answer how many; call '
  'it again until it answers 0. As ops.cancel_job. For a flood that shall not be worked off.';

create or replace function ops.pause(kind text default null, reason text default null) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  if pause.kind is not null then
    perform assert_kind(pause.kind);
  end if;
  if pause.reason is not null then
    perform assert_text('reason', pause.reason);
  end if;
  insert into pauses as p (kind, reason)
  values (pause.kind, pause.reason)
  on conflict do nothing;
  update pauses p set reason = pause.reason
  where p.kind is not distinct from pause.kind and pause.reason is not null;
  perform audit('pause', jsonb_build_object('kind', pause.kind, 'reason', pause.reason));
end
$$;
comment on function ops.pause is
  'Start no more jobs of a kind, or without one of all kinds, until ops.resume: requests are accepted '
  'and wait, what runs goes on, deadlines count. When a kind fails, or before work on the provider.';

create or replace function ops.resume(kind text default null) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_found boolean;
begin
  if resume.kind is not null then
    perform assert_kind(resume.kind);
    if exists (select from pauses p where p.kind is null) then
      raise 'kind: all kinds are paused; end that with ops.resume().' using errcode = 'BT409';
    end if;
  end if;
  delete from pauses p where resume.kind is null or p.kind = resume.kind;
  v_found := found;
  perform audit('resume', jsonb_build_object('kind', resume.kind, 'was_paused', v_found));
  return v_found;
end
$$;
comment on function ops.resume is
  'End a pause, or without a kind all of them; what has waited gets its turn by priority and age, '
  'within seconds. False: nothing was paused.';

create or replace function ops.set_concurrency(project_id uuid, concurrency int) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_project_id(set_concurrency.project_id);
  if set_concurrency.concurrency not between 0 and 10000 then
    raise 'concurrency: must be 0 to 10000; null is no limit.' using errcode = 'BT400';
  end if;
  insert into project_concurrency (project_id, concurrency)
  values (set_concurrency.project_id, set_concurrency.concurrency)
  on conflict on constraint project_concurrency_pkey do update
  set concurrency = excluded.concurrency;
  perform audit('set_concurrency', jsonb_build_object(
    'project_id', set_concurrency.project_id, 'concurrency', set_concurrency.concurrency));
end
$$;
comment on function ops.set_concurrency is
  'Run at most so many attempts of a project at once; null: no limit, 0: none. What runs goes on, the '
  'others wait without being in the way of other projects. For a tenant that floods the queue.';

create or replace view ops.holds as
select
  'pause' as hold, p.kind, null::uuid as project_id, null::text as project, null::int as concurrency,
  null::bigint as running,
  (select count(*) from job_due d
   where d.reason = 'paused' and d.line in (
     select f.kind from flows f where p.kind is null or f.kind = p.kind)) as waiting,
  p.reason, p.created_at as since
from pauses p
union all
select
  'concurrency', null, c.project_id, o.name, c.concurrency,
  (select count(*) from leases l
   where (select j.project_id from jobs j where j.id = l.job_id) = c.project_id),
  (select count(*) from job_due d
   where d.reason = 'concurrency' and d.line = c.project_id::text),
  null, null
from project_concurrency c
join projects o on o.id = c.project_id
where c.concurrency is not null;
comment on view ops.holds is
  'What operators hold back: kinds that are paused (no kind: all), projects with a limit of attempts, '
  'and how many jobs wait for that. Ask it when jobs wait though workers are idle.';

create or replace function ops.prioritize(id uuid) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
#variable_conflict use_column
declare
  v_job jobs := lock_job(prioritize.id);
begin
  if v_job.status <> 'pending' then
    return false;
  end if;
  update jobs set front = true where id = v_job.id;
  update procrastinate_jobs set priority = rank_of('front')
  where id = v_job.ticket_id and status = 'todo';
  update job_due
  set rank = rank_of('front'),
    not_before = case when reason = 'retry' then baton_now() else not_before end
  where job_id = v_job.id;
  perform audit('prioritize', jsonb_build_object('job_id', v_job.id));
  return true;
end
$$;
comment on function ops.prioritize is
  'Put a waiting job before all others; one that waits for a retry is tried at once, one that is held '
  'back is the first to be let go. False: it runs or has ended. When somebody important waits.';

create or replace function ops.drain_worker(id bigint) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
#variable_conflict use_column
declare
  v_state text := (select w.state from workers w where w.id = drain_worker.id for update);
begin
  if v_state is null then
    raise 'id: there is no worker with this id.' using errcode = 'BT404';
  elsif v_state <> 'running' then
    return false;
  end if;
  update workers w set state = 'draining' where w.id = drain_worker.id;
  perform audit('drain_worker', jsonb_build_object('worker_id', drain_worker.id));
  return true;
end
$$;
comment on function ops.drain_worker is
  'Let a worker (ops.workers) take no more jobs within 5 seconds, finish what it has or give it back '
  'after 30, and end; whatever runs it starts a new one. False: it has been told so, or has ended. For '
  'one that misbehaves, or before its machine goes.';

create or replace function ops.hold(reason text) returns void
language plpgsql security definer set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_text('reason', hold.reason);
  insert into installation (identity, reason, held_since)
  values (database_identity(), hold.reason, baton_now())
  on conflict (one) do update set reason = excluded.reason, held_since = excluded.held_since;
  perform audit('hold', jsonb_build_object('reason', hold.reason));
end
$$;
comment on function ops.hold is
  'Let this database do nothing of its own accord: jobs are accepted and wait, those that run may '
  'end, none is begun, no webhook is sent. For a copy that cannot tell that it is one: of the files, '
  'of a volume, at a point in time. Until ops.go_live().';

create or replace function ops.go_live() returns boolean
language plpgsql security definer set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_reason text := hold_reason();
begin
  insert into installation (identity) values (database_identity())
  on conflict (one) do update set identity = excluded.identity, reason = null, held_since = null;
  perform reconcile_jobs(1000);  -- at once, what a worker could not claim and so lost the ticket of
  perform audit('go_live', jsonb_build_object('reason', v_reason));
  return v_reason is not null;
end
$$;
comment on function ops.go_live is
  'Let a restored copy, or what ops.hold holds, begin to work: its jobs are run and its webhooks sent '
  'within seconds. Only when no other copy does. False: it was not held.';

create or replace function ops.set_language(project_id uuid, language text) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_project_id(set_language.project_id);
  if set_language.language is null or not exists (
    select from pg_ts_config c
    where c.cfgname = set_language.language and pg_ts_config_is_visible(c.oid)) then
    raise 'language: there is no text search configuration "%"; there are: %.',
      set_language.language,
      (select string_agg(c.cfgname, ', ' order by c.cfgname) from pg_ts_config c
       where pg_ts_config_is_visible(c.oid)) using errcode = 'BT400';
  end if;
  update projects p set language = set_language.language, updated_at = baton_now()
  where p.id = set_language.project_id and p.language <> set_language.language;
  if found then
    delete from search_entries e where e.project_id = set_language.project_id;
    perform note_project(set_language.project_id);
  end if;
  perform audit('set_language', jsonb_build_object(
    'project_id', set_language.project_id, 'language', set_language.language));
end
$$;
comment on function ops.set_language is
  'Say what a project''s events are mostly written in, so that a question finds other forms of its '
  'words: a text search configuration such as german, or simple to match words only as they stand '
  '(select cfgname from pg_ts_config). What its questions reach is entered again.';

-- --- ops: digests -------------------------------------------------------------------------

create or replace function ops.set_digest(
  project_id uuid, cron text, time_zone text default 'UTC', deliver jsonb default null
) returns timestamptz
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_schedule digest_schedules;
begin
  perform assert_project_id(set_digest.project_id);
  v_schedule := put_digest_schedule(
    coalesce(
      (select d.user_id from digest_schedules d where d.project_id = set_digest.project_id),
      (select p.owner_id from projects p where p.id = set_digest.project_id)),
    set_digest.project_id, set_digest.cron, set_digest.time_zone, set_digest.deliver);
  perform audit('set_digest', jsonb_build_object(
    'project_id', set_digest.project_id, 'cron', v_schedule.cron,
    'time_zone', v_schedule.time_zone, 'deliver', set_digest.deliver));
  return v_schedule.next_at;
end
$$;
comment on function ops.set_digest is
  'Write a digest of a project at each time of a cron expression such as 0 9 * * 1-5, in a time zone '
  'such as Europe/Berlin, about what happened since the one before; answers when the next one is due. '
  'In place of the schedule that the project has. deliver: a list of {"integration_id", "channel_id"} '
  'of Discord or Slack to post it to; null leaves that as it is.';

create or replace function ops.remove_digest(project_id uuid) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_found boolean;
begin
  perform assert_project_id(remove_digest.project_id);
  delete from digest_schedules d where d.project_id = remove_digest.project_id;
  v_found := found;
  perform audit('remove_digest', jsonb_build_object(
    'project_id', remove_digest.project_id, 'was_set', v_found));
  return v_found;
end
$$;
comment on function ops.remove_digest is
  'Write no more digests of a project; those that are there stay. False: it had no schedule.';

-- --- Retention ----------------------------------------------------------------------------
--
-- Workers remove what is older than the table retention says, in batches, of which only one runs at
-- a time and after which all rest for three times as long as it took: a backlog of any size uses
-- a quarter of one connection. A pass goes through a table by a key that grows with time, from where
-- the last batch stopped, so that it does not walk over what it has removed and vacuum has not. For
-- most tables the key is the primary key: ids of version 7 begin with the time, and need no other
-- index. An hour after a pass the next begins. A copy that is held removes nothing.

-- The lowest id of version 7 of a time.
create or replace function uuid_at(p_time timestamptz) returns uuid
language sql immutable as $$
  select rpad(lpad(
    to_hex((extract(epoch from greatest(p_time, 'epoch')) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

-- Remove rows of a table of retention that are from before p_before, beginning with the key p_from
-- (null: the lowest), at most p_limit. What somebody has locked, and what is still needed, stays.
-- Answers how many were removed and up to which key; a null key: there are no more.
create or replace function remove_old(
  p_name text, p_before timestamptz, p_from text, p_limit int, out removed int, out reached text
) language plpgsql as $$
declare
  v_id uuid := uuid_at(p_before);
  v_from uuid := case
    when p_name in (
      'jobs', 'handoffs', 'insights', 'events', 'charges', 'untracked_events', 'search_entries')
    then coalesce(p_from, '00000000-0000-0000-0000-000000000000')::uuid end;
  v_from_time timestamptz := case
    when p_name in (
      'provider_calls', 'deleted_jobs', 'idempotency_keys', 'audit', 'hook_deliveries')
    then coalesce(p_from, '-infinity')::timestamptz end;
  v_ids uuid[];
  v_rows tid[];
begin
  if p_name in ('charges', 'provider_calls') then  -- what they come to stays, in usage_by_day
    perform count_usage(20000);
    p_before := least(p_before, coalesce((select until from usage_counted), '-infinity'));
  elsif p_name = 'audit' then  -- it goes by the server's clock, however far a session sets its own
    p_before := least(p_before, now() - (select least from retention where name = 'audit'));
  end if;
  case p_name
  when 'jobs' then  -- with their logs and deliveries; one that is still to be delivered stays
    v_ids := array(
      select j.id from jobs j
      where j.id >= v_from and j.id < v_id and j.completed_at < p_before
        and not exists (
          select from webhook_deliveries d where d.job_id = j.id and d.next_attempt_at is not null)
      order by j.id limit p_limit for update skip locked);
    with gone as (
      delete from jobs where id = any (v_ids) returning id, project_id
    )
    insert into deleted_jobs (id, project_id) select id, project_id from gone on conflict do nothing;
    reached := v_ids[p_limit];
  when 'handoffs' then  -- job before artifact, as everywhere
    v_ids := array(
      select id from handoffs
      where id >= v_from and id < v_id and created_at < p_before order by id limit p_limit);
    perform from jobs
    where id in (select job_id from handoffs where id = any (v_ids)) order by id for update;
    delete from handoffs where id = any (v_ids);
    reached := v_ids[p_limit];
  when 'insights' then
    v_ids := array(
      select id from insights
      where id >= v_from and id < v_id and created_at < p_before order by id limit p_limit);
    perform from jobs
    where id in (select job_id from insights where id = any (v_ids)) order by id for update;
    delete from insights where id = any (v_ids);
    reached := v_ids[p_limit];
  when 'events' then
    v_ids := array(
      select id from events
      where id >= v_from and id < v_id and created_at < p_before
      order by id limit p_limit for update skip locked);
    delete from events where id = any (v_ids);
    reached := v_ids[p_limit];
  when 'search_entries' then
    v_ids := array(
      select id from search_entries
      where id >= v_from and id < v_id order by id limit p_limit for update skip locked);
    delete from search_entries where id = any (v_ids);
    reached := v_ids[p_limit];
  when 'charges' then  -- what grants have paid stays paid: one row instead of many
    v_ids := array(
      select job_id from charges
      where job_id >= v_from and job_id < v_id and created_at < p_before
      order by job_id limit p_limit for update skip locked);
    with gone as (
      delete from charges where job_id = any (v_ids) returning payer_id, from_grants
    )
    insert into credit_grants (user_id, credits, reason)
    select payer_id, -sum(from_grants), 'used by jobs whose charges have been removed'
    from gone
    join users u on u.id = payer_id
    group by payer_id
    having sum(from_grants) > 0;
    reached := v_ids[p_limit];
  when 'webhook_deliveries' then  -- with their attempts; what waits stays
    with gone as (
      delete from webhook_deliveries
      where id in (
        select id from webhook_deliveries
        where id >= coalesce(p_from, '') and id < 'msg_' || replace(v_id::text, '-', '')
          and ended_at < p_before
        order by id limit p_limit for update skip locked)
      returning id
    )
    select count(*), max(id) into removed, reached from gone;
  when 'provider_calls' then
    v_rows := array(
      select ctid from provider_calls
      where created_at >= v_from_time and created_at < p_before
      order by created_at limit p_limit for update skip locked);
    with gone as (delete from provider_calls where ctid = any (v_rows) returning created_at)
    select count(*), max(created_at) into removed, reached from gone;
  when 'deleted_jobs' then
    v_rows := array(
      select ctid from deleted_jobs
      where deleted_at >= v_from_time and deleted_at < p_before
      order by deleted_at limit p_limit for update skip locked);
    with gone as (delete from deleted_jobs where ctid = any (v_rows) returning deleted_at)
    select count(*), max(deleted_at) into removed, reached from gone;
  when 'idempotency_keys' then
    v_rows := array(
      select ctid from idempotency_keys
      where created_at >= v_from_time and created_at < p_before
      order by created_at limit p_limit for update skip locked);
    with gone as (delete from idempotency_keys where ctid = any (v_rows) returning created_at)
    select count(*), max(created_at) into removed, reached from gone;
  when 'audit' then
    v_rows := array(
      select ctid from ops.audit
      where at >= v_from_time and at < p_before
      order by at limit p_limit for update skip locked);
    with gone as (delete from ops.audit where ctid = any (v_rows) returning at)
    select count(*), max(at) into removed, reached from gone;
  when 'hook_deliveries' then  -- one that waits to be mapped stays
    v_rows := array(
      select ctid from hook_deliveries h
      where received_at >= v_from_time and received_at < p_before
        and not exists (
          select from waiting_deliveries w
          where w.integration_id = h.integration_id and w.delivery_id = h.delivery_id)
      order by received_at limit p_limit for update skip locked);
    with gone as (delete from hook_deliveries where ctid = any (v_rows) returning received_at)
    select count(*), max(received_at) into removed, reached from gone;
  when 'untracked_events' then
    v_ids := array(
      select id from untracked_events
      where id >= v_from and id < v_id and created_at < p_before
      order by id limit p_limit for update skip locked);
    delete from untracked_events where id = any (v_ids);
    reached := v_ids[p_limit];
  end case;
  removed := coalesce(removed, cardinality(v_ids));
  if removed < p_limit then
    reached := null;
  end if;
end
$$;

-- Run the batch that is due, if one is and no other runs: what a worker calls again and again.
-- Answers the seconds until it should do so once more. A table that cannot be cleaned up, say
-- because its rows are locked, is tried again ten minutes later and is not in the way of the others.
create or replace function apply_retention(p_limit int) returns double precision
language plpgsql security definer set search_path = public, pg_temp as $$
declare
  v_due retention;
  v_removed int;
  v_reached text;
  v_error text;
  v_rest interval;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('baton retention', 0))
    or exists (select from retention where rest_until > baton_clock()) then
    return 1;
  end if;
  if hold_reason() is not null then
    return 10;
  end if;
  select * into v_due
  from retention
  where keep is not null and due_at <= baton_now()
  order by due_at, name
  limit 1;
  if not found then
    return 10;
  end if;
  begin
    select removed, reached into v_removed, v_reached
    from remove_old(v_due.name, baton_now() - v_due.keep, v_due.reached, p_limit);
  exception when others then
    v_error := left(sqlerrm, 300);
  end;
  v_rest := least(3 * (clock_timestamp() - statement_timestamp()), '30 seconds');
  update retention
  set
    due_at = case
      when v_error is not null then baton_now() + interval '10 minutes'
      when v_reached is null then baton_now() + interval '1 hour'
      else baton_now() end,
    rest_until = baton_clock() + v_rest,
    reached = v_reached,
    done_at = case when v_error is null and v_reached is null then baton_now() else done_at end,
    removed = removed + coalesce(v_removed, 0),
    error = v_error
  where name = v_due.name;
  return extract(epoch from v_rest);
end
$$;

drop function if exists forget_keys(int);  -- of version 2

-- The row of retention by that name, if p_keep may be asked of it; p_argument is how the caller
-- calls it.
create or replace function assert_retention(p_name text, p_argument text, p_keep interval) returns void
language plpgsql stable as $$
declare
  v_least interval := (select least from retention where name = p_name);
begin
  if v_least is null then
    raise 'name: there is no retention of "%"; there is one of: %.', p_name,
      (select string_agg(name, ', ' order by name) from retention) using errcode = 'BT404';
  end if;
  -- As a time too: '1 mon -29 days' counts as a day, and is none before the first of March.
  if p_keep < v_least or baton_now() - p_keep > baton_now() - v_least then
    raise '%: % are kept for at least %.', p_argument, p_name, v_least using errcode = 'BT400';
  end if;
  if p_keep > interval '100 years' then
    raise '%: must be 100 years at most, or null for ever.', p_argument using errcode = 'BT400';
  end if;
end
$$;

create or replace function ops.set_retention(name text, keep interval) returns void
language plpgsql security definer set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_retention(set_retention.name, 'keep', set_retention.keep);
  update retention r
  set keep = set_retention.keep, due_at = baton_now(), reached = null, done_at = baton_now()
  where r.name = set_retention.name;
  perform audit('set_retention', jsonb_build_object(
    'name', set_retention.name, 'keep', set_retention.keep));
end
$$;
comment on function ops.set_retention is
  'Say how long the rows of a table are kept (see ops.retention): ended jobs and deliveries from '
  'their end, the others from when they were stored. Null: for ever. Workers begin with it within '
  'seconds and remove a backlog in small batches.';

create or replace function ops.purge(
  older_than interval, name text default 'jobs', max int default 10000,
  out removed int, out more boolean
)
language plpgsql security definer set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_reached text;
begin
  if older_than is null then
    raise 'older_than: must be an interval, such as ''30 days''.' using errcode = 'BT400';
  end if;
  perform assert_batch(purge.max);
  perform assert_retention(purge.name, 'older_than', older_than);
  select r.removed, r.reached into purge.removed, v_reached
  from remove_old(purge.name, baton_now() - older_than, null, purge.max) r;
  more := v_reached is not null;
  update retention r set removed = r.removed + purge.removed where r.name = purge.name;
  perform audit('purge', jsonb_build_object(
    'older_than', older_than, 'name', purge.name, 'max', purge.max, 'removed', purge.removed));
end
$$;
comment on function ops.purge is
  'Remove now what is older, at most max rows a call; more: call again. For ended jobs (their '
  'artifacts stay; clients get 410), or for another table of ops.retention by name. For what is to '
  'happen every day there is ops.set_retention. In psql: select * from ops.purge(''7 days'') \watch 1';

create or replace view ops.retention as
select
  r.name, r.keep, r.least, greatest(c.reltuples, 0)::bigint as rows, pg_total_relation_size(c.oid) as bytes,
  case r.name
    when 'jobs' then (select created_at from jobs order by id limit 1)
    when 'handoffs' then (select created_at from handoffs order by id limit 1)
    when 'insights' then (select created_at from insights order by id limit 1)
    when 'events' then (select created_at from events order by id limit 1)
    when 'charges' then (select created_at from charges order by job_id limit 1)
    when 'webhook_deliveries' then (select created_at from webhook_deliveries order by id limit 1)
    when 'provider_calls' then (select min(created_at) from provider_calls)
    when 'deleted_jobs' then (select min(deleted_at) from deleted_jobs)
    when 'idempotency_keys' then (select min(created_at) from idempotency_keys)
    when 'audit' then (select min(at) from ops.audit)
    when 'hook_deliveries' then (select min(received_at) from hook_deliveries)
    when 'untracked_events' then (select created_at from untracked_events order by id limit 1)
    when 'search_entries' then (
      select to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
      from search_entries order by id limit 1)
  end as oldest,
  r.removed, r.done_at, r.reached is not null as running, r.error,
  r.keep is not null and r.done_at < baton_now() - interval '1 day' as behind
from retention r
join pg_class c on c.oid = case r.name
  when 'audit' then 'ops.audit'::regclass else to_regclass('public.' || r.name) end;
comment on view ops.retention is
  'How long each table keeps its rows (null: for ever; least: what may be set at least), about how '
  'many rows it has, its bytes with indexes, its oldest row, how many rows have been removed so far, '
  'and since when nothing is there that is too old. behind: that was more than a day ago. Change it '
  'with ops.set_retention, or remove at once with ops.purge.';

-- Vacuum. The tables through which every job passes keep few live rows, and a share of few is soon
-- reached anyway: what counts is that it comes early and is not slowed down. Tables that keep rows
-- are vacuumed, and so give room back to new ones, when a twentieth of them is dead instead of a
-- fifth. Measured in docs/retention.md.
alter table leases set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_cost_delay = 0);
alter table job_due set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_cost_delay = 0);
alter table jobs set (
  autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000,
  -- What operators count is counted in an index alone, as far as pages are known to be all visible.
  autovacuum_vacuum_insert_scale_factor = 0.02);
alter table job_events set (autovacuum_vacuum_scale_factor = 0.05);
alter table webhook_deliveries set (
  autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);
alter table idempotency_keys set (autovacuum_vacuum_scale_factor = 0.05);
alter table handoffs set (autovacuum_vacuum_scale_factor = 0.05);
alter table events set (autovacuum_vacuum_scale_factor = 0.05);
alter table provider_calls set (autovacuum_vacuum_scale_factor = 0.05);
alter table waiting_deliveries set (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
  autovacuum_vacuum_cost_delay = 0);

-- --- ops: see -----------------------------------------------------------------------------
--
-- Every view answers in under 100 ms with a million finished jobs and 200,000 pending ones
-- (bench/ops.py). So none of them reads finished jobs other than the latest few by an index, and
-- what is looked for among the unfinished ones is looked for in jobs_unfinished_by_deadline alone,
-- which has all that is counted in it, or among the oldest thousand: what nothing wakes grows old.
--
-- They run with their owner's rights. No view shows a digest, a secret, a URL beyond its host, or
-- anything of what a job reads or writes.

-- What must be true, and what to do when it is not: the texts and limits of ops.checks. The rows
-- belong to this file; only `chosen` is an operator's.
create table if not exists ops.thresholds (
  name text primary key,
  chosen numeric check (chosen >= 0),
  by_default numeric not null,
  value numeric not null generated always as (coalesce(chosen, by_default)) stored,
  unit text not null check (unit in ('seconds', 'count', 'ratio', 'transactions', 'bytes')),
  place int not null,  -- in which order a person reads them
  meaning text not null,  -- of a check that is not ok; or of a limit that other checks refer to
  advice text  -- null: not a check of its own
);
comment on table ops.thresholds is
  'From which value on a check of ops.health is not ok. Change one with ops.set_threshold.';
comment on column ops.thresholds.chosen is 'By ops.set_threshold; null: by_default counts.';
comment on column ops.thresholds.value is 'What counts.';
comment on column ops.thresholds.advice is 'What to do; null: no check of its own, others use it.';

insert into ops.thresholds (place, name, by_default, unit, meaning, advice)
select row_number() over (), t.*
from (values
  ('worker_seen', 30, 'seconds',
   'No worker has given a sign for this long (no value: none is registered): no job is run.',
   'Start a worker (baton worker, or baton run), then see ops.workers. Jobs wait safely meanwhile.'),
  ('oldest_pending', 300, 'seconds',
   'A job that could run has waited this long for a worker.',
   'See ops.workers (alive? all busy? provider down?) and ops.queue_by_project (one project flooding '
   'the queue?). Start more workers, ops.pause a kind, or ops.cancel_project.'),
  ('oldest_expired_lease', 30, 'seconds',
   'An attempt lost its worker, and no process has taken its job back: nobody sweeps.',
   'Each API and worker process sweeps every 5 s: see that one runs and reaches the database; look '
   'for "sweep failed" in its log.'),
  ('oldest_overdue_retry', 30, 'seconds',
   'A parked job is due, and no process has woken it: nobody sweeps.',
   'As for oldest_expired_lease.'),
  ('oldest_past_deadline', 60, 'seconds',
   'A job is past its deadline, and no process has ended it: nobody sweeps.',
   'As for oldest_expired_lease.'),
  ('longest_attempt', 900, 'seconds',
   'An attempt runs for this long though its worker stops it after BATON_ATTEMPT_TIMEOUT (110 s).',
   'See ops.running; end it with ops.cancel_job and restart the worker that holds it.'),
  ('lost_jobs', 0, 'count',
   'Unfinished jobs that nothing would wake: no ticket, no lease, not parked, for 90 s.',
   'They are mended every 30 s by any API or worker process: see that one runs. See ops.stuck.'),
  ('lost_tickets', 0, 'count',
   'Tickets that a worker took which is gone, for 90 s.',
   'As for lost_jobs.'),
  ('dead_workers', 0, 'count',
   'Workers that fell silent within dead_workers_window without being stopped.',
   'See ops.workers and the end of its log. Its jobs have been taken back; the supervisor should have '
   'started another. Ok again when dead_workers_window has passed.'),
  ('open_breakers', 0, 'count',
   'Living workers that cannot reach their provider: they take no jobs but one now and then, to try.',
   'See the provider''s status page and the keys. Jobs wait without using up their tries, and go on '
   'by themselves.'),
  ('provider_failures', 0.5, 'ratio',
   'So many of the latest 200 calls of models in the last 10 minutes failed (from 20 calls on).',
   'select outcome, status, count(*) from provider_calls where created_at > now() - ''10 minutes'''
   '::interval group by 1, 2; then as for open_breakers.'),
  ('failing_kinds', 0, 'count',
   'Kinds of which more than failure_ratio of the latest 1,000 that ended in the last hour failed, '
   'and no fewer than failure_minimum.',
   'See ops.failures for the codes and a job of each. When it is mended: ops.retry_failed.'),
  ('pending_of_a_project', 500, 'count',
   'Unfinished jobs of the project that has the most: others may wait behind them.',
   'See ops.queue_by_project; ops.set_concurrency or ops.set_limit hold it back, ops.cancel_project '
   'ends its jobs.'),
  ('held', 0, 'count',
   'The database is held, or is a copy that was restored: no job is run, no webhook is sent.',
   'Is it meant to serve? Then: select ops.go_live(); see docs/backup.md first.'),
  ('oldest_webhook', 300, 'seconds',
   'A webhook has been due for this long: nobody sends.',
   'Workers send: see that one runs, and look for its log. See ops.webhook_backlog.'),
  ('webhook_backlog', 10000, 'count',
   'Webhooks that wait to be sent for the first time or again.',
   'See ops.webhook_backlog for the receivers and why they refuse; a dead one is disabled after five '
   'days by itself.'),
  ('oldest_delivery', 300, 'seconds',
   'What an integration sent has waited this long to become events: nobody maps, or not fast enough.',
   'Workers map: see that one runs, and look for "deliveries not mapped" in its log. See '
   'ops.integrations for what waits.'),
  ('failed_deliveries', 0, 'count',
   'Deliveries of the last 24 hours that became no event because the database refused it.',
   'See failed and last_error in ops.integrations and "events refused" in the log of the worker: it '
   'is a fault of Baton''s. The others of the integration are not held up.'),
  ('refused_deliveries', 100, 'count',
   'Requests for the integration that has the most in this and the last hour whose signature was '
   'wrong, or that were not what its source sends.',
   'See ops.integrations. Unverified: the secret at the source is another one; rotate it and paste the '
   'new one. Malformed: something else sends to its address, or the source has changed.'),
  ('oldest_transaction', 300, 'seconds',
   'A transaction of this database is open for so long: what it may still see cannot be cleaned up.',
   'The detail names the session; select pg_terminate_backend(pid) ends it.'),
  ('oldest_xmin', 1000000, 'transactions',
   'Some session or standby may still look at rows this many transactions old: none deleted since '
   'can be cleaned up, and the queue slows down.',
   'As for oldest_transaction; a standby with hot_standby_feedback may be behind it.'),
  ('oldest_prepared', 300, 'seconds',
   'A transaction was prepared so long ago and neither committed nor rolled back. Baton prepares none.',
   'select * from pg_prepared_xacts; then ROLLBACK PREPARED its gid.'),
  ('slot_xmin', 1000000, 'transactions',
   'A replication slot keeps rows this many transactions old from being cleaned up.',
   'select * from pg_replication_slots; drop the slot of a replica that is gone.'),
  ('slot_wal', 10737418240, 'bytes',
   'A replication slot keeps this much write-ahead log; the disk may fill up.',
   'As for slot_xmin.'),
  ('dead_tuples', 100000, 'count',
   'Dead rows of the table of the queue that has the most: taking a job slows down.',
   'Is something holding them (oldest_xmin, slot_xmin, oldest_prepared)? Else: vacuum the table that '
   'the detail names.'),
  ('retention_behind', 86400, 'seconds',
   'Some table has had rows for this long that are older than its retention: it grows.',
   'See ops.retention: error says why, removed whether it goes on. It needs a worker. '
   'ops.purge removes by hand.'),
  ('notification_queue', 0.1, 'ratio',
   'How full the queue of notifications is: a session listens and does not read. Full, it stops '
   'everything that notifies.',
   'Find the session: select pid, application_name from pg_stat_activity where query ilike '
   '''listen%''; pg_terminate_backend(pid) ends it.'),
  ('connections', 0.85, 'ratio',
   'How many of the connections that the server allows are taken.',
   'select application_name, state, count(*) from pg_stat_activity group by 1, 2; fewer processes, a '
   'larger max_connections, or end idle sessions that are not Baton''s.'),
  ('transaction_ids', 500000000, 'transactions',
   'How old the oldest row is that has not been frozen; at 2,000,000,000 the server stops writing.',
   'Let autovacuum work: end what holds it (oldest_xmin, slot_xmin), then: vacuum (freeze).'),
  ('invalid_indexes', 0, 'count',
   'Indexes that are not used because making them was interrupted.',
   'reindex index concurrently the one that the detail names, or drop it if its name ends in _ccnew.'),
  ('failure_ratio', 0.5, 'ratio', 'From which part of failed jobs on a kind counts as failing.', null),
  ('failure_minimum', 10, 'count', 'How many must have failed for a kind to count as failing.', null),
  ('dead_workers_window', 900, 'seconds', 'For how long a dead worker is told of.', null),
  -- Since version 4; the places of those before stay.
  ('overdue_digest', 600, 'seconds',
   'A digest is due for so long, and no worker has asked for it.',
   'Workers look each minute, when they have room: see ops.workers (alive? all busy? provider down?) '
   'and ops.digests, whose error says why one was refused. What was missed is made up by one digest.')
) as t (name, by_default, unit, meaning, advice)
on conflict (name) do update
set place = excluded.place, by_default = excluded.by_default, unit = excluded.unit,
  meaning = excluded.meaning, advice = excluded.advice;

create or replace function ops.set_threshold(name text, value numeric default null) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_before numeric;
  v_unit text;
begin
  select t.value, t.unit into v_before, v_unit
  from ops.thresholds t where t.name = set_threshold.name for update;
  if not found then
    raise 'name: there is no threshold named "%"; see ops.thresholds.', set_threshold.name
      using errcode = 'BT404';
  end if;
  -- What ops.health can show: it has intervals, and counts as bigint.
  if set_threshold.value not between 0 and 1000000000000 then
    raise 'value: a threshold is a number from 0 on, 1000000000000 at most, or null for the default.'
      using errcode = 'BT400';
  elsif v_unit in ('count', 'transactions', 'bytes') and value <> trunc(value) then
    raise 'value: must be a whole number, as the unit of % is %.', name, v_unit
      using errcode = 'BT400';
  end if;
  update ops.thresholds t set chosen = trim_scale(round(set_threshold.value, 6))
  where t.name = set_threshold.name;
  perform audit('set_threshold', jsonb_build_object(
    'name', set_threshold.name, 'value', set_threshold.value, 'before', v_before));
end
$$;
comment on function ops.set_threshold is
  'From which value on a check of ops.health is not ok; null: the default again. Units and defaults '
  'are in ops.thresholds.';

-- The job of a ticket; null when it names none, which nothing of Baton's writes.
create or replace function job_of_ticket(p_args jsonb) returns uuid
language sql immutable as $$
  select case when p_args ->> 'job_id' ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
    then (p_args ->> 'job_id')::uuid end
$$;

-- This and the next run with the search path of who asks a view, which may lack the schema public.
create or replace function seconds_since(p_time timestamptz) returns numeric
language sql stable as $$
  select round(extract(epoch from public.baton_now() - p_time), 1)
$$;

-- How long ago, for people.
create or replace function ago(p_time timestamptz) returns interval
language sql stable as $$
  select date_trunc('second', public.baton_now() - p_time)
$$;

create or replace function minute_of(p_time timestamptz) returns timestamptz
language sql immutable as $$
  select date_bin('1 minute', p_time, '2000-01-01 00:00:00Z')
$$;

-- Of the oldest hundred tickets, those whose jobs wait for a worker and nothing else.
create or replace view waiting_longest as
select j.id as job_id, j.updated_at as since
from (
  select id, args from procrastinate_jobs where status = 'todo' order by id limit 100
) t
join jobs j on j.id = job_of_ticket(t.args) and j.ticket_id = t.id
where j.status = 'pending'
  -- One that has just been let go by ops.set_concurrency waited for its own project.
  and not exists (select from job_due d where d.job_id = j.id);

-- Of the oldest thousand unfinished jobs, those that nothing would wake.
create or replace view lost_jobs as
select j.id as job_id, j.status, j.updated_at as since
from (
  select id, status, ticket_id, updated_at
  from jobs
  where status in ('pending', 'processing')
  order by deadline_at
  limit 1000
) j
where j.updated_at < baton_now() - interval '90 seconds' and case j.status
  -- Not "exists": for a thousand jobs that would read all tickets.
  when 'processing' then (select true from leases l where l.job_id = j.id) is null
  else (select true from job_due d where d.job_id = j.id and d.reason <> 'admitted') is null
    and (select true from procrastinate_jobs t where t.id = j.ticket_id) is null
  end;

-- Tickets in the hands of nobody.
create or replace view lost_tickets as
select t.id as ticket_id, job_of_ticket(t.args) as job_id, j.updated_at as since
from procrastinate_jobs t
left join procrastinate_workers w on w.id = t.worker_id
left join jobs j on j.id = job_of_ticket(t.args)
where t.status = 'doing' and (w.id is null or w.last_heartbeat < now() - interval '90 seconds')
  and (j.id is null or j.updated_at < baton_now() - interval '90 seconds');

create or replace view ops.checks as
with measured (name, value, detail) as (
  -- The end of one that was stopped in order is a sign, too: another follows within seconds.
  select 'worker_seen',
    round(extract(epoch from now() - greatest(
      max(last_heartbeat), (select max(seen_at) from workers where state = 'stopped'))), 1),
    count(*) filter (where last_heartbeat > now() - interval '30 seconds') || ' alive'
  from procrastinate_workers
  union all
  select 'oldest_pending', seconds_since(min(since)),
    'job ' || (array_agg(job_id order by since))[1]
  from waiting_longest
  union all
  select 'oldest_expired_lease', seconds_since(min(expires_at)),
    count(*) || ' expired' from leases where expires_at < baton_now()
  union all
  select 'oldest_overdue_retry', seconds_since(min(not_before)),
    count(*) || ' overdue' from job_due where not_before < baton_now()
  union all
  select 'oldest_past_deadline', seconds_since(deadline_at), 'job ' || id
  from (
    select id, deadline_at
    from jobs
    where status in ('pending', 'processing') and deadline_at < baton_now()
    order by deadline_at
    limit 1
  ) late
  union all
  select 'longest_attempt', seconds_since(claimed_at), 'job ' || job_id
  from (select job_id, claimed_at from leases order by claimed_at limit 1) longest
  union all
  select 'lost_jobs', count(*), 'job ' || (array_agg(job_id order by since))[1] from lost_jobs
  union all
  select 'lost_tickets', count(*), 'ticket ' || min(ticket_id) from lost_tickets
  union all
  select 'dead_workers', count(*), string_agg(w.name, ', ' order by w.seen_at)
  from workers w
  where w.state <> 'stopped' and w.seen_at < baton_now() - interval '30 seconds'
    and w.seen_at > baton_now() - interval '1 second' * (
      select value from ops.thresholds where name = 'dead_workers_window')
  union all
  select 'open_breakers', count(*), string_agg(w.name, ', ' order by w.seen_at)
  from workers w
  where w.state in ('running', 'draining') and w.breaker_until is not null
    and w.seen_at >= baton_now() - interval '30 seconds'
  union all
  select 'provider_failures',
    case when count(*) >= 20 then round(avg((outcome <> 'ok')::int), 3) end,
    string_agg(distinct outcome, ', ') filter (where outcome <> 'ok')
  from (
    select outcome
    from provider_calls
    where created_at > baton_now() - interval '10 minutes'
    order by created_at desc
    limit 200
  ) latest
  union all
  select 'failing_kinds', count(*), string_agg(format('%s: %s of %s', kind, failed, ended), ', ')
  from flows
  cross join lateral (
    select count(*) filter (where bad) as failed, count(*) as ended
    from (
      (select true as bad, completed_at
       from jobs
       where status = 'failed' and kind = flows.kind
         and completed_at > baton_now() - interval '1 hour'
         and error_code not in ('cancelled', 'plan_violation', 'quota_exceeded')
         -- Nobody's fault: a project where nothing has happened is asked about again and again.
         and not (error_code = 'no_result' and error_meta ->> 'stage' is not distinct from 'context')
       order by completed_at desc
       limit 1000)
      union all
      (select false, completed_at
       from jobs
       where status = 'completed' and kind = flows.kind
         and completed_at > baton_now() - interval '1 hour'
       order by completed_at desc
       limit 1000)
      order by completed_at desc
      limit 1000
    ) latest
  ) latest
  where failed >= (select value from ops.thresholds where name = 'failure_minimum')
    and failed > ended * (select value from ops.thresholds where name = 'failure_ratio')
  union all
  select 'pending_of_a_project', unfinished, format('project %s', project_id)
  from (
    select project_id, count(*) as unfinished
    from jobs
    where status in ('pending', 'processing')
    group by project_id
    order by unfinished desc
    limit 1
  ) fullest
  union all
  select 'held', (hold_reason() is not null)::int, hold_reason()
  union all
  (
    with recursive hosts as (  -- from host to host by the index, as in claim_webhooks
      (select host, next_attempt_at from webhook_deliveries
       where next_attempt_at is not null order by host, next_attempt_at limit 1)
      union all
      select next.host, next.next_attempt_at
      from hosts
      cross join lateral (
        select host, next_attempt_at from webhook_deliveries
        where next_attempt_at is not null and host > hosts.host
        order by host, next_attempt_at limit 1
      ) next
    )
    select 'oldest_webhook', greatest(0, seconds_since(min(next_attempt_at))),
      'to ' || (array_agg(host order by next_attempt_at))[1]
    from hosts
  )
  union all
  select 'webhook_backlog', count(*), null
  from webhook_deliveries where next_attempt_at is not null
  union all
  (
    with recursive oldest as (  -- from one integration to the next by the index
      (select integration_id, received_at from waiting_deliveries
       order by integration_id, seq limit 1)
      union all
      select next.integration_id, next.received_at
      from oldest
      cross join lateral (
        select integration_id, received_at from waiting_deliveries d
        where d.integration_id > oldest.integration_id
        order by d.integration_id, seq limit 1
      ) next
    )
    select 'oldest_delivery', greatest(0, seconds_since(min(received_at))),
      'integration ' || (array_agg(integration_id order by received_at))[1]
    from oldest
  )
  union all
  select 'failed_deliveries', count(*), 'integration ' || min(integration_id::text)
  from hook_deliveries
  where error is not null and received_at > baton_now() - interval '24 hours'
  union all
  select 'refused_deliveries', refused, 'integration ' || integration_id
  from (
    select integration_id, sum(count) as refused
    from hook_counts
    where hour >= date_trunc('hour', baton_now()) - interval '1 hour'
      and result in ('unverified', 'malformed', 'too_large')
    group by integration_id
    order by refused desc
    limit 1
  ) most
  union all
  select 'oldest_transaction', round(extract(epoch from now() - xact_start), 1),
    format('pid %s, %s', pid, application_name)
  from (
    select pid, application_name, xact_start
    from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null
      and backend_type = 'client backend'
    order by xact_start
    limit 1
  ) oldest
  union all
  select 'oldest_xmin', age(backend_xmin), format('pid %s, %s', pid, application_name)
  from (
    select pid, application_name, backend_xmin
    from pg_stat_activity
    where pid <> pg_backend_pid() and backend_xmin is not null
      and (datname = current_database() or backend_type = 'walsender')
    order by age(backend_xmin) desc
    limit 1
  ) oldest
  union all
  select 'oldest_prepared', round(extract(epoch from now() - min(prepared)), 1),
    'gid ' || (array_agg(gid order by prepared))[1]
  from pg_prepared_xacts
  union all
  select 'slot_xmin', max(greatest(age(xmin), age(catalog_xmin))),
    'slot ' || (array_agg(slot_name order by greatest(age(xmin), age(catalog_xmin)) desc nulls last))[1]
  from pg_replication_slots where coalesce(xmin, catalog_xmin) is not null
  union all
  select 'slot_wal', max(kept), 'slot ' || (array_agg(slot_name order by kept desc))[1]
  from (
    select slot_name, pg_wal_lsn_diff(
      case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
      restart_lsn) as kept
    from pg_replication_slots
    where restart_lsn is not null
  ) slots
  union all
  select 'dead_tuples', max(dead), (array_agg(tables.name order by dead desc))[1]
  from unnest(array['procrastinate_jobs', 'procrastinate_events', 'leases', 'job_due']) tables (name)
  cross join lateral pg_stat_get_dead_tuples(('public.' || tables.name)::regclass) as dead
  union all
  select 'overdue_digest', greatest(0, seconds_since(min(next_at))),
    'project ' || (array_agg(project_id order by next_at))[1]
  from digest_schedules
  where next_at <= baton_now()
  union all
  select 'retention_behind', greatest(0, seconds_since(min(done_at))),
    (array_agg(name order by done_at))[1]
  from retention where keep is not null
  union all
  select 'notification_queue', round(pg_notification_queue_usage()::numeric, 7), null
  union all
  select 'connections',
    round(sum(numbackends) / (current_setting('max_connections')::numeric
      - current_setting('superuser_reserved_connections')::numeric), 3),
    format('%s taken', sum(numbackends))
  from pg_stat_database
  union all
  select 'transaction_ids', max(age(datfrozenxid)),
    'database ' || (array_agg(datname order by age(datfrozenxid) desc))[1]
  from pg_database
  union all
  select 'invalid_indexes', count(*), string_agg(indexrelid::regclass::text, ', ')
  from pg_index
  where not indisvalid
)
select
  t.name,
  case t.name when 'worker_seen' then coalesce(m.value <= t.value, false)
    else coalesce(m.value, 0) <= t.value end as ok,
  case t.name when 'worker_seen' then m.value else coalesce(m.value, 0) end as value,
  t.value as threshold, t.unit, m.detail, t.meaning, t.advice
from ops.thresholds t
left join measured m on m.name = t.name
where t.advice is not null
order by ok, t.place;
comment on view ops.checks is
  'What ops.health is made of, one row per check, what is wrong first: the value, from which on it is '
  'not ok, what that means and what to do. Ask: select * from ops.checks where not ok;';
comment on column ops.checks.value is
  'In the unit beside it. Null, for worker_seen only: no worker is registered.';
comment on column ops.checks.threshold is 'A value above it is not ok; see ops.set_threshold.';
comment on column ops.checks.detail is 'Which one: the job, project, session or table.';

create or replace view ops.health as
with told as (
  select
    bool_and(c.ok) as ok, coalesce(array_agg(c.name) filter (where not c.ok), '{}') as failing,
    jsonb_object_agg(c.name, shown.value)
      || jsonb_object_agg(c.name || '_threshold', shown.threshold)
      || jsonb_object_agg(c.name || '_ok', c.ok) as columns
  from ops.checks c
  cross join lateral (
    select
      case c.unit when 'seconds' then to_jsonb(c.value * interval '1 second')
        else to_jsonb(c.value) end as value,
      case c.unit when 'seconds' then to_jsonb(c.threshold * interval '1 second')
        else to_jsonb(c.threshold) end as threshold
  ) shown
)
select
  told.ok, baton_now() as at, told.failing,
  (select max(version) from schema_version) as schema_version,
  (select count(*) from procrastinate_workers
   where last_heartbeat > now() - interval '30 seconds') as workers_alive,
  (select count(*) from leases) as running,
  array(select coalesce(kind, 'all') from pauses order by 1) as paused,
  columns.*
from told
cross join lateral jsonb_to_record(told.columns) as columns (
  worker_seen interval, worker_seen_threshold interval, worker_seen_ok boolean,
  oldest_pending interval, oldest_pending_threshold interval, oldest_pending_ok boolean,
  oldest_expired_lease interval, oldest_expired_lease_threshold interval, oldest_expired_lease_ok boolean,
  oldest_overdue_retry interval, oldest_overdue_retry_threshold interval, oldest_overdue_retry_ok boolean,
  oldest_past_deadline interval, oldest_past_deadline_threshold interval, oldest_past_deadline_ok boolean,
  longest_attempt interval, longest_attempt_threshold interval, longest_attempt_ok boolean,
  lost_jobs bigint, lost_jobs_threshold bigint, lost_jobs_ok boolean,
  lost_tickets bigint, lost_tickets_threshold bigint, lost_tickets_ok boolean,
  dead_workers bigint, dead_workers_threshold bigint, dead_workers_ok boolean,
  open_breakers bigint, open_breakers_threshold bigint, open_breakers_ok boolean,
  provider_failures numeric, provider_failures_threshold numeric, provider_failures_ok boolean,
  failing_kinds bigint, failing_kinds_threshold bigint, failing_kinds_ok boolean,
  held bigint, held_threshold bigint, held_ok boolean,
  pending_of_a_project bigint, pending_of_a_project_threshold bigint, pending_of_a_project_ok boolean,
  oldest_webhook interval, oldest_webhook_threshold interval, oldest_webhook_ok boolean,
  webhook_backlog bigint, webhook_backlog_threshold bigint, webhook_backlog_ok boolean,
  oldest_transaction interval, oldest_transaction_threshold interval, oldest_transaction_ok boolean,
  oldest_xmin bigint, oldest_xmin_threshold bigint, oldest_xmin_ok boolean,
  oldest_prepared interval, oldest_prepared_threshold interval, oldest_prepared_ok boolean,
  slot_xmin bigint, slot_xmin_threshold bigint, slot_xmin_ok boolean,
  slot_wal bigint, slot_wal_threshold bigint, slot_wal_ok boolean,
  dead_tuples bigint, dead_tuples_threshold bigint, dead_tuples_ok boolean,
  notification_queue numeric, notification_queue_threshold numeric, notification_queue_ok boolean,
  connections numeric, connections_threshold numeric, connections_ok boolean,
  transaction_ids bigint, transaction_ids_threshold bigint, transaction_ids_ok boolean,
  invalid_indexes bigint, invalid_indexes_threshold bigint, invalid_indexes_ok boolean,
  retention_behind interval, retention_behind_threshold interval, retention_behind_ok boolean,
  -- Since version 4. A view takes new columns at its end only.
  oldest_delivery interval, oldest_delivery_threshold interval, oldest_delivery_ok boolean,
  failed_deliveries bigint, failed_deliveries_threshold bigint, failed_deliveries_ok boolean,
  refused_deliveries bigint, refused_deliveries_threshold bigint, refused_deliveries_ok boolean,
  overdue_digest interval, overdue_digest_threshold interval, overdue_digest_ok boolean
);
comment on view ops.health is
  'Is all well? One row to look at first, and for a monitor to alert on when ok is false: failing names '
  'the checks that are not ok, and each check has its value, its threshold and its own ok. What they '
  'mean and what to do: select * from ops.checks;';
comment on column ops.health.failing is 'The checks that are not ok.';
comment on column ops.health.paused is 'Kinds that ops.pause holds back; that alone is not wrong.';
comment on column ops.health.running is 'Attempts that run at this moment.';

create or replace view ops.queue_depth as
select
  kind, priority,
  coalesce(sum(jobs) filter (where status = 'pending' and reason is null), 0)::bigint as ready,
  coalesce(sum(jobs) filter (where reason = 'retry'), 0)::bigint as parked,
  coalesce(sum(jobs) filter (where reason = 'paused'), 0)::bigint as paused,
  coalesce(sum(jobs) filter (where reason not in ('retry', 'paused')), 0)::bigint as held,
  coalesce(sum(jobs) filter (where status = 'processing'), 0)::bigint as running,
  ago(min(oldest) filter (where status = 'pending' and reason is null)) as oldest_ready,
  ago(min(oldest) filter (where status = 'pending')) as oldest
from (
  select j.kind, j.priority, j.status, d.reason, count(*) as jobs, min(j.created_at) as oldest
  from jobs j
  left join job_due d on d.job_id = j.id and d.reason <> 'admitted'
  where j.status in ('pending', 'processing')
  group by j.kind, j.priority, j.status, d.reason
) counted
group by kind, priority
order by kind, case priority when 'high' then 1 when 'normal' then 2 else 3 end;
comment on view ops.queue_depth is
  'What is not done yet, by kind and priority. Ask it when jobs are late: many ready means too few '
  'workers, many parked that a provider fails, paused and held that an operator said so.';
comment on column ops.queue_depth.ready is 'Wait for a worker and nothing else.';
comment on column ops.queue_depth.parked is 'Wait for their next try after a provider error.';
comment on column ops.queue_depth.paused is 'Wait for ops.resume of their kind.';
comment on column ops.queue_depth.held is
  'Wait for others of their project (ops.set_concurrency).';
comment on column ops.queue_depth.oldest_ready is 'Since the oldest of the ready ones was asked for.';
comment on column ops.queue_depth.oldest is 'Since the oldest of all pending ones was asked for.';

create or replace view ops.queue_by_project as
select
  u.project_id, p.name as project, o.email as owner, u.unfinished, coalesce(r.running, 0) as running,
  u.share, ago(u.oldest) as oldest
from (
  select project_id, count(*) as unfinished, min(created_at) as oldest,
    round(count(*) / sum(count(*)) over (), 3) as share
  from jobs
  where status in ('pending', 'processing')
  group by project_id
  order by unfinished desc
  limit 20
) u
join projects p on p.id = u.project_id
join users o on o.id = p.owner_id
left join (
  select j.project_id, count(*) as running
  from leases l
  join jobs j on j.id = l.job_id
  group by j.project_id
) r on r.project_id = u.project_id
order by u.unfinished desc;
comment on view ops.queue_by_project is
  'The twenty projects with the most unfinished jobs. Ask it when one may be flooding the queue; then '
  'ops.set_concurrency holds it back, ops.cancel_project ends its jobs.';
comment on column ops.queue_by_project.share is 'Of all unfinished jobs.';

create or replace view ops.running as
select
  l.job_id, j.kind, j.project_id, p.name as project, u.email as user_email, l.worker,
  w.id as worker_id, j.attempt, ago(l.claimed_at) as running_for,
  coalesce(j.progress ->> 'step', 'starting') as step, (j.progress ->> 'value')::numeric as progress,
  ago(j.created_at) as asked_for, date_trunc('second', l.expires_at - baton_now()) as lease_left,
  date_trunc('second', j.deadline_at - baton_now()) as deadline_in, j.crashes, j.provider_errors
from leases l
join jobs j on j.id = l.job_id
join projects p on p.id = j.project_id
join users u on u.id = j.user_id
left join lateral (  -- a name comes back when its process does
  select max(w.id) as id from workers w where w.name = l.worker
) w on true
order by l.claimed_at;
comment on view ops.running is
  'Every attempt that runs at this moment, the longest first: whose job, on which worker, for how long, '
  'and at which step. Ask it when jobs start and do not end.';
comment on column ops.running.running_for is 'Since this attempt began; the job may have had others.';
comment on column ops.running.asked_for is 'How long ago the job was submitted.';
comment on column ops.running.lease_left is
  'Until the job is taken from its worker. Renewed to 15 s every 5 s; below 0 the worker is silent.';
comment on column ops.running.crashes is 'Earlier attempts whose worker died; the third is final.';
comment on column ops.running.provider_errors is 'Earlier attempts that the provider failed; of five.';

create or replace view ops.stuck as
with limits as (
  select
    max(value) filter (where name = 'oldest_pending') * interval '1 second' as oldest_pending,
    max(value) filter (where name = 'longest_attempt') * interval '1 second' as longest_attempt
  from ops.thresholds
),
found (job_id, why, since, what_to_do) as (
  (select id, 'past its deadline', deadline_at,
    'A sweep of any API or worker process ends it within seconds: see that one runs.'
  from jobs
  where status in ('pending', 'processing') and deadline_at < baton_now()
  order by deadline_at
  limit 200)
  union all
  (select id, 'not started by the time that was asked for', start_deadline_at,
    'A sweep of any API or worker process ends it within seconds: see that one runs.'
  from jobs
  where status = 'pending' and started_at is null and start_deadline_at < baton_now()
  order by start_deadline_at
  limit 200)
  union all
  (select job_id, format('the lease of worker %s has expired', worker), expires_at,
    'A sweep of any API or worker process takes it back within seconds: see that one runs.'
  from leases
  where expires_at < baton_now()
  order by expires_at
  limit 200)
  union all
  select job_id,
    case status when 'processing' then 'processing without a lease' else 'pending without a ticket' end,
    since,
    'Any API or worker process mends it within 30 s: see that one runs.'
  from lost_jobs
  union all
  select job_id, format('its ticket %s is in the hands of a dead worker', ticket_id), since,
    'Any API or worker process mends it within 30 s: see that one runs.'
  from lost_tickets
  union all
  (select job_id, 'its next try is overdue', not_before,
    'Any API or worker process wakes it within a second: see that one runs.'
  from job_due
  where not_before < baton_now() - interval '10 seconds'
  order by not_before
  limit 200)
  union all
  (select l.job_id, format('this attempt runs for longer than any should, on worker %s', l.worker),
    l.claimed_at,
    format('select ops.cancel_job(%L, ''runs too long''); then restart that worker.', l.job_id)
  from leases l
  where l.claimed_at < baton_now() - (select longest_attempt from limits)
  order by l.claimed_at
  limit 200)
  union all
  (select j.id, format('%s of its attempts took their worker with them', j.crashes), j.updated_at,
    format('It runs in a process of its own now and ends when that dies too. If its worker suffers: '
      'select ops.cancel_job(%L, ''crashes its worker'');', j.id)
  from (
    (select job_id as id from leases)
    union
    (select id from jobs where status in ('pending', 'processing') order by deadline_at limit 1000)
  ) looked_at
  join jobs j on j.id = looked_at.id
  where j.crashes >= 2 and j.status in ('pending', 'processing')
  limit 200)
  union all
  (select d.job_id,
    case when j.progress ->> 'step' = 'waiting' then 'the provider is down'
      else format('the provider has failed %s of its attempts', j.provider_errors) end,
    j.updated_at,
    format('Tried again in %s. See ops.workers and the provider''s status page.',
      date_trunc('second', d.not_before - baton_now()))
  from job_due d
  join jobs j on j.id = d.job_id and j.status = 'pending'
  where d.reason = 'retry' and d.not_before between baton_now() and baton_now() + interval '1 day'
    and (j.progress ->> 'step' = 'waiting' or j.provider_errors >= 2)
  order by d.not_before
  limit 200)
  union all
  select job_id,
    case
      when not exists (select from procrastinate_workers
        where last_heartbeat > now() - interval '30 seconds') then 'no worker is alive'
      else 'waits for a worker for longer than it should' end,
    since,
    'See ops.workers: start one, or more; see ops.queue_by_project for who fills the queue.'
  from waiting_longest
  where since < baton_now() - (select oldest_pending from limits)
)
select *
from (
  select distinct on (j.id)
    j.id as job_id, j.kind, j.project_id, p.name as project, u.email as user_email, j.status,
    found.why, ago(found.since) as for_so_long, found.what_to_do
  from found
  join jobs j on j.id = found.job_id
  join projects p on p.id = j.project_id
  join users u on u.id = j.user_id
  order by j.id, found.since
) stuck
order by for_so_long desc;
comment on view ops.stuck is
  'Jobs that do not go on as they should, why, and what to do about each, the longest first. Ask it '
  'when somebody waits for a job. At most 200 of a cause, looked for among the oldest; jobs that are '
  'paused or held on purpose are in ops.queue_depth.';
comment on column ops.stuck.for_so_long is 'Since the cause that is told of.';

create or replace view ops.workers as
select
  coalesce(w.id, p.id) as id, w.name,
  case
    when coalesce(p.last_heartbeat > now() - interval '30 seconds', false)
      then coalesce(w.state, 'running')
    when w.state = 'stopped' then 'stopped'
    else 'lost'
  end as state,
  coalesce(date_trunc('second', now() - p.last_heartbeat), ago(w.seen_at)) as last_seen,
  coalesce(l.running, 0) as running, w.concurrency, w.provider,
  w.breaker_until is not null as provider_down,
  case when w.breaker_until > baton_now()
    then date_trunc('second', w.breaker_until - baton_now()) end as provider_asked_in,
  w.version, w.host, ago(w.started_at) as started
from workers w
full join procrastinate_workers p on p.id = w.id
left join (
  select worker, count(*) as running from leases group by worker
) l on l.worker = w.name and w.state in ('running', 'draining')
order by state = 'stopped', id;
comment on view ops.workers is
  'The worker processes, those that ended within a day too: alive or lost, how much they run, whether '
  'their provider answers. Ask it when jobs wait; ops.drain_worker(id) stops one gently.';
comment on column ops.workers.name is 'Host and process; null: of version 2, which does not tell.';
comment on column ops.workers.state is
  'running; draining: takes no more jobs; stopped: ended in order; lost: silent for 30 s.';
comment on column ops.workers.running is 'Attempts that it runs, of at most concurrency.';
comment on column ops.workers.provider_down is 'Its provider failed it too often; it only tries now and then.';

create or replace view ops.failures as
select
  k.kind, f.error_code, f.failures, ago(f.latest) as latest, j.id as latest_job_id,
  j.error as latest_error, j.error_meta -> 'retryable' = 'true' as retryable
from flows k
cross join lateral (
  select error_code, count(*) as failures, max(completed_at) as latest
  from jobs
  where status = 'failed' and kind = k.kind and completed_at > baton_now() - interval '24 hours'
  group by error_code
) f
cross join lateral (
  select id, error, error_meta
  from jobs
  where status = 'failed' and kind = k.kind and completed_at = f.latest
    and error_code = f.error_code
  limit 1
) j
order by f.failures desc;
comment on view ops.failures is
  'Failed jobs of the last 24 hours by kind and code, with the latest one of each. Ask it when users '
  'report errors. What is retryable: ops.retry_failed(error_code, since, max), once the cause is gone.';
comment on column ops.failures.retryable is 'Whether it may help to try the latest one again.';

create or replace view ops.throughput as
with moved as (
  select created, started, completed, failed, count(*) as jobs
  from (
    select
      minute_of(created_at) as created, minute_of(started_at) as started,
      null::timestamptz as completed, null::timestamptz as failed
    from jobs
    where status in ('pending', 'processing')
    union all
    select minute_of(created_at), minute_of(started_at), minute_of(completed_at), null
    from flows k
    cross join lateral (
      select created_at, started_at, completed_at
      from jobs j
      where j.kind = k.kind and j.status = 'completed'
        and j.completed_at >= minute_of(baton_now()) - interval '59 minutes'
    ) j
    union all
    select minute_of(created_at), minute_of(started_at), null, minute_of(completed_at)
    from flows k
    cross join lateral (
      select created_at, started_at, completed_at
      from jobs j
      where j.kind = k.kind and j.status = 'failed'
        and j.completed_at >= minute_of(baton_now()) - interval '59 minutes'
    ) j
  ) minutes
  group by created, started, completed, failed
)
select
  minute,
  coalesce(sum(jobs) filter (where what = 'created'), 0)::bigint as submitted,
  coalesce(sum(jobs) filter (where what = 'started'), 0)::bigint as started,
  coalesce(sum(jobs) filter (where what = 'completed'), 0)::bigint as completed,
  coalesce(sum(jobs) filter (where what = 'failed'), 0)::bigint as failed
from generate_series(
  minute_of(baton_now()) - interval '59 minutes', minute_of(baton_now()), interval '1 minute'
) minute
left join (
  select what, at, jobs
  from moved
  cross join lateral (values
    ('created', created), ('started', started), ('completed', completed), ('failed', failed)
  ) each (what, at)
) each on each.at = minute
group by minute
order by minute desc;
comment on view ops.throughput is
  'Jobs of the last hour by minute, the newest first: submitted, started for the first time, completed, '
  'failed. Ask it whether the service keeps up, and since when it does not. Deleted jobs do not count.';

create or replace view ops.slow_kinds as
select
  k.kind, s.jobs as sample, ago(s.oldest) as sample_since,
  s.waits[1] as wait_p50, s.waits[2] as wait_p95, s.waits[3] as wait_p99,
  s.runs[1] as run_p50, s.runs[2] as run_p95, s.runs[3] as run_p99
from flows k
cross join lateral (
  select
    count(*) as jobs, min(completed_at) as oldest,
    percentile_disc(array[0.5, 0.95, 0.99]) within group (
      order by date_trunc('milliseconds', started_at - created_at)) as waits,
    percentile_disc(array[0.5, 0.95, 0.99]) within group (
      order by date_trunc('milliseconds', completed_at - started_at)) as runs
  from (
    select created_at, started_at, completed_at
    from jobs
    where status = 'completed' and kind = k.kind
    order by completed_at desc
    limit 1000
  ) latest
) s
where s.jobs > 0
order by s.runs[2] desc;
comment on view ops.slow_kinds is
  'How long the latest 1,000 completed jobs of each kind waited for their first start and then ran, '
  'waits for retries included; the slowest kind first. Ask it when jobs feel slow, to see which part is.';
comment on column ops.slow_kinds.sample is 'How many jobs that is; below 1,000: all there are.';
comment on column ops.slow_kinds.sample_since is 'When the oldest of them was completed.';

-- The deliveries that wait, without the others and without their payloads.
create index if not exists webhook_deliveries_waiting
  on webhook_deliveries (project_id, endpoint_id, host) include (created_at, next_attempt_at, id)
  where state = 'waiting';

create or replace view ops.integrations as
select
  i.id as integration_id, i.source, i.workspace_name as workspace, u.email as owner,
  o.slug as organization, i.enabled, c.last_delivery, w.waiting, ago(w.oldest) as oldest_waiting,
  c.accepted, c.duplicates, c.unverified, c.malformed, c.too_large, c.full, f.failed, f.last_error,
  r.resources, r.untracked
from integrations i
join users u on u.id = i.user_id
left join organizations o on o.id = i.organization_id
cross join lateral (
  select
    max(last_at) filter (where result in ('accepted', 'duplicate')) as last_delivery,
    sum(lately) filter (where result = 'accepted') as accepted,
    sum(lately) filter (where result = 'duplicate') as duplicates,
    sum(lately) filter (where result = 'unverified') as unverified,
    sum(lately) filter (where result = 'malformed') as malformed,
    sum(lately) filter (where result = 'too_large') as too_large,
    sum(lately) filter (where result = 'full') as "full"
  from (
    select result, last_at,
      case when hour > baton_now() - interval '25 hours' then count end as lately
    from hook_counts where integration_id = i.id
  ) counted
) c
cross join lateral (
  select count(*) as waiting, min(received_at) as oldest
  from waiting_deliveries where integration_id = i.id
) w
left join (
  select integration_id, count(*) as failed, (array_agg(error order by received_at desc))[1] as last_error
  from hook_deliveries
  where error is not null and received_at > baton_now() - interval '24 hours'
  group by integration_id
) f on f.integration_id = i.id
cross join lateral (
  select count(*) as resources, count(*) filter (where project_id is null) as untracked
  from resources where integration_id = i.id
) r
order by i.source, i.workspace_name, i.id;
comment on view ops.integrations is
  'Every integration: whose it is, when its source last sent, how much waits to become events, and how '
  'much of the last 24 hours was accepted and refused, and why. Ask it when the activity of a source '
  'is missing: nothing was sent, it was refused, it waits, or its resources are of no project.';
comment on column ops.integrations.last_delivery is
  'Of an accepted or repeated one; a few seconds late. Null: there was none.';
comment on column ops.integrations.unverified is
  'Their signature or token was missing or wrong: the source has another secret, or a stranger sends.';
comment on column ops.integrations.malformed is 'Verified, but not what the source sends.';
comment on column ops.integrations."full" is
  'Refused because too much of the integration waited; the source sends them again.';
comment on column ops.integrations.failed is
  'Became no event, as the database refused it; last_error is why.';
comment on column ops.integrations.untracked is
  'Of its resources, those that are of no project: their events wait.';

create or replace view ops.webhook_backlog as
  select
    d.project_id, d.endpoint_id, d.host, d.waiting, d.oldest, d.next_attempt_at, e.enabled,
    e.disabled_reason, last.error as last_error
  from (
    select
      project_id, endpoint_id, host, count(*) as waiting, min(created_at) as oldest,
      min(next_attempt_at) as next_attempt_at, min(id) as oldest_id
    from webhook_deliveries
    where state = 'waiting'
    group by project_id, endpoint_id, host
  ) d
  left join webhook_endpoints e on e.id = d.endpoint_id
  left join lateral (
    select a.error
    from webhook_attempts a
    where a.delivery_id = d.oldest_id
    order by a.id desc
    limit 1
  ) last on true;
comment on view ops.webhook_backlog is
  'Webhooks that wait, by receiver: how many, since when, and why the latest attempt of the oldest one '
  'failed. Without an endpoint_id it is what jobs named as their webhook_url. URLs may hold tokens: '
  'only the host is shown.';
comment on column ops.webhook_backlog.next_attempt_at is
  'Of the next one; null: the endpoint is disabled, and nothing is sent until it is enabled.';

create or replace view ops.digests as
select
  d.project_id, p.name as project_name, d.cron, d.time_zone, d.next_at,
  greatest(ago(d.next_at), interval '0') as overdue,
  d.covered_until, d.job_id, j.status, j.error_code, d.error,
  (select count(*) from digest_channels c where c.project_id = d.project_id) as channels,
  m.waiting, m.dead, m.delivery_error
from digest_schedules d
join projects p on p.id = d.project_id
left join jobs j on j.id = d.job_id
cross join lateral (
  select
    count(*) filter (where state = 'waiting') as waiting,
    count(*) filter (where state = 'dead') as dead,
    (array_agg(error order by id desc) filter (where error is not null))[1] as delivery_error
  from (
    select * from chat_messages m where m.project_id = d.project_id order by id desc limit 100
  ) latest
) m
order by d.next_at;
comment on view ops.digests is
  'When digests are written, the next one first: what became of the latest one (job_id and its status), '
  'and why none could be asked for (error).';
comment on column ops.digests.overdue is
  'Workers look each minute: more means that none runs, or that all of them are busy.';
comment on column ops.digests.waiting is
  'Of the latest 100 messages to channels, those that are to be posted yet, or again.';
comment on column ops.digests.dead is 'Of them, those that could not be posted within a day.';
comment on column ops.digests.delivery_error is 'Why, of the latest one that failed.';
comment on column ops.digests.covered_until is 'Where the period of the next digest begins.';

create or replace view ops.help as
select what, call, coalesce(substring(said from '^.*?[.:](?=\s|$)'), said) as about
from (
  select 'view' as what, 'select * from ops.' || relname || ';' as call,
    obj_description(oid, 'pg_class') as said, relname as name
  from pg_class
  where relnamespace = 'ops'::regnamespace and relkind in ('v', 'r')
  union all
  select 'function', format('select ops.%s(%s);', proname, pg_get_function_arguments(oid)),
    obj_description(oid, 'pg_proc'), proname
  from pg_proc
  where pronamespace = 'ops'::regnamespace
) listed
order by what desc, name;
comment on view ops.help is
  'Every view and function of the schema ops, with its arguments and what it is for. All of it: '
  '\d+ ops.* and \df+ ops.* in psql.';

-- What the API tells of ops.checks, which looks at sessions that the API may not see.
create or replace function check_states() returns table (name text, ok boolean)
language sql stable security definer set search_path = public, pg_temp as $$
  select c.name, c.ok from ops.checks c
$$;

-- --- ops: integrations --------------------------------------------------------------------
--
-- What `baton integration` calls, and what can be done without it. Secrets come encrypted, and never go
-- into the audit.

create or replace function assert_integration(p_integration_id uuid) returns void
language plpgsql stable as $$
begin
  perform from integrations where id = p_integration_id;
  if not found then
    raise 'integration: there is no integration with this id.' using errcode = 'BT404';
  end if;
end
$$;

create or replace function ops.create_integration(
  source text, owner uuid, organization uuid default null, project uuid default null,
  name text default null, secret bytea default null, token bytea default null
) returns uuid
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_id uuid;
begin
  perform assert_user(owner, 'owner');
  if name is not null then
    perform assert_text('name', name);
  end if;
  if organization is not null then
    if not exists (select from organizations where id = organization) then
      raise 'organization: there is no organization with this id.' using errcode = 'BT404';
    end if;
    perform from members m where m.organization_id = organization and m.user_id = owner;
    if not found then
      raise 'owner: the user is no member of the organization.' using errcode = 'BT400';
    end if;
  end if;
  if project is not null then
    if not exists (select from projects where id = project) then
      raise 'project: there is no project with this id.' using errcode = 'BT404';
    end if;
    perform assert_reach(owner, organization, project, 'project');
  end if;
  v_id := add_integration(
    owner, organization, create_integration.source, null, name, project, secret, token);
  perform audit('create_integration', jsonb_build_object(
    'integration_id', v_id, 'source', source, 'owner', owner, 'organization_id', organization,
    'project_id', project));
  return v_id;
end
$$;
comment on function ops.create_integration is
  'Connect a source, for a user or for an organization that the owner is in, and answer the id, with '
  'which the source''s address ends. Secret and token have to be encrypted: '
  'use `baton integration create`, which makes and shows the secret.';

create or replace function ops.rotate_integration(
  integration uuid, secret bytea, keep interval default '24 hours'
) returns void
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_integration(integration);
  if keep is null or keep < '0' or keep > '30 days' then
    raise 'keep: must be an interval from 0 to 30 days.' using errcode = 'BT400';
  end if;
  perform from integrations where id = integration for no key update;
  perform replace_secret(integration, 'signing', secret, keep);
  perform audit('rotate_integration', jsonb_build_object(
    'integration_id', integration, 'keep', keep));
end
$$;
comment on function ops.rotate_integration is
  'Give an integration a new signing secret; the old one is good for as long as keep says. The secret '
  'has to be encrypted: use `baton integration rotate`. Null: it has none, and takes the one that its '
  'source brings, if that is how the source does it.';

create or replace function ops.enable_integration(integration uuid, enabled boolean default true)
returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
begin
  perform assert_integration(integration);
  if enabled is null then
    raise 'enabled: must be true or false.' using errcode = 'BT400';
  end if;
  update integrations i
  set enabled = enable_integration.enabled, updated_at = baton_now()
  where i.id = integration and i.enabled <> enable_integration.enabled;
  if not found then
    return false;
  end if;
  perform audit('enable_integration', jsonb_build_object(
    'integration_id', integration, 'enabled', enabled));
  return true;
end
$$;
comment on function ops.enable_integration is
  'Let an integration take what its source sends, or with false refuse it (404) until it is enabled '
  'again; what has been taken is mapped. Answers whether that was a change.';

create or replace function ops.delete_integration(integration uuid, max int default 10000)
returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_gone boolean;
begin
  perform assert_integration(integration);
  perform assert_batch(delete_integration.max);
  v_gone := remove_integration(integration, delete_integration.max);
  perform audit('delete_integration', jsonb_build_object(
    'integration_id', integration, 'gone', v_gone));
  return v_gone;
end
$$;
comment on function ops.delete_integration is
  'Delete an integration with its secrets, resources and what waits; events of projects stay. It takes '
  'nothing more from the first call on. False: there was more to remove than max rows; call it again.';

create or replace function ops.map_resource(integration uuid, resource text, project uuid)
returns int
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_integration integrations;
  v_count int;
  v_moved int := 0;
begin
  perform assert_integration(integration);
  select * into v_integration from integrations where id = integration;
  if not exists (select from resources r where r.integration_id = integration and r.id = resource) then
    raise 'resource: the integration has no such resource; see ops.resources.' using errcode = 'BT404';
  end if;
  if not exists (select from projects p where p.id = project) then
    raise 'project: there is no project with this id.' using errcode = 'BT404';
  end if;
  perform assert_reach(v_integration.user_id, v_integration.organization_id, project, 'project');
  perform move_resources(array[integration], array[resource], project);
  loop
    v_count := pull_events(project, 1000);
    exit when v_count is null;
    v_moved := v_moved + v_count;
  end loop;
  perform audit('map_resource', jsonb_build_object(
    'integration_id', integration, 'resource', resource, 'project_id', project,
    'moved', v_moved));
  return v_moved;
end
$$;
comment on function ops.map_resource is
  'Give a resource of an integration, such as a repository or a channel, to a project: what it sends '
  'becomes events there, what came in the last 14 days at once. Answers how many events had waited. '
  'Of an organization to its projects, of a user to projects that the user owns.';

create or replace function ops.unmap_resource(integration uuid, resource text) returns boolean
language plpgsql security definer
set search_path = public, pg_temp set lock_timeout = '2s' as $$
declare
  v_project_id uuid;
begin
  perform assert_integration(integration);
  select project_id into v_project_id
  from resources r where r.integration_id = integration and r.id = resource for no key update;
  if not found then
    raise 'resource: the integration has no such resource; see ops.resources.' using errcode = 'BT404';
  end if;
  if v_project_id is null then
    return false;
  end if;
  perform move_resources(array[integration], array[resource], null);
  perform audit('unmap_resource', jsonb_build_object(
    'integration_id', integration, 'resource', resource, 'project_id', v_project_id));
  return true;
end
$$;
comment on function ops.unmap_resource is
  'Take a resource away from its project: its events stay there, and what it sends from now on waits. '
  'Answers whether it had a project.';

create or replace view ops.resources as
select
  r.integration_id, i.source, r.id as resource, r.name, r.type, p.id as project_id,
  p.name as project, case when r.project_id is null then w.waiting end as waiting,
  ago(r.last_event_at) as last_event
from resources r
join integrations i on i.id = r.integration_id
left join projects p on p.id = r.project_id
cross join lateral (
  select count(*) as waiting
  from (
    select from untracked_events e
    where e.integration_id = r.integration_id and e.resource_id = r.id
    limit 10000
  ) e
) w
order by r.project_id is not null, r.last_event_at desc;
comment on view ops.resources is
  'The repositories, channels and boards that events came from, those without a project first, with how '
  'many events of each wait for one (counted to 10000). Change it with ops.map_resource.';

-- Encrypted values, for `baton integration rekey`: from one id to the next.
create or replace function stored_secrets(p_after uuid, p_limit int)
returns table (id uuid, value bytea)
language sql stable as $$
  select s.id, s.value from integration_secrets s where s.id > p_after order by s.id limit p_limit
$$;

-- Put values, encrypted anew, in the place of those that they were made from; one that has changed
-- meanwhile stays. Answers how many were.
create or replace function rekey_secrets(p_ids uuid[], p_old bytea[], p_new bytea[]) returns int
language plpgsql as $$
declare
  v_count int;
begin
  update integration_secrets s
  set value = k.new
  from unnest(p_ids, p_old, p_new) as k (id, old, new)
  where s.id = k.id and s.value = k.old;
  get diagnostics v_count = row_count;
  perform audit('rekey_secrets', jsonb_build_object('secrets', v_count));
  return v_count;
end
$$;

-- --- Roles --------------------------------------------------------------------------------
--
-- Four roles, none of which can log in; logins are members of them (docs/roles.md). Every process
-- takes its role on when it connects, so that one login can serve for all, or each has its own.
--
--   baton_migrate  owns everything of ours, and may take on the other three
--   baton_api      the API: reads what the queries of callers join, writes by functions only
--   baton_worker   the workers: the tickets, and the functions that move a job
--   baton_ops      a person: the views and functions of ops, and a look at all but what is secret
--
-- What a process calls is a security definer: it runs with the rights of baton_migrate and with a
-- search path of its own, and so do the functions that it calls in turn, to which nobody else has a
-- right. Roles belong to the cluster: another of its databases may be making them just now.

do $$
declare
  v_role text;
  v_member text;
begin
  foreach v_role in array '{baton_api, baton_worker, baton_ops, baton_migrate}'::text[] loop
    continue when to_regrole(v_role) is not null;
    begin
      execute format('create role %I nologin', v_role);
    exception
      when duplicate_object or unique_violation then null;
      when insufficient_privilege then
        raise 'Baton needs four roles, which "%" may not make. Let an administrator run: '
          'create role baton_api; create role baton_worker; create role baton_ops; '
          'create role baton_migrate in role baton_api, baton_worker, baton_ops; '
          'grant baton_migrate to %;', current_user, quote_ident(current_user)
          using errcode = 'insufficient_privilege';
    end;
  end loop;

  -- The login that migrates made all of this and can take it all away; it may be the only one.
  for v_role, v_member in values
    ('baton_api', 'baton_migrate'), ('baton_worker', 'baton_migrate'),
    ('baton_ops', 'baton_migrate'), ('baton_migrate', current_user),
    ('pg_read_all_stats', 'baton_ops'),  -- who holds up whom: pg_stat_activity of other logins
    ('pg_signal_backend', 'baton_ops')  -- and to end that
  loop
    continue when pg_has_role(v_member, v_role, 'usage');
    begin
      execute format('grant %I to %I', v_role, v_member);
    exception when insufficient_privilege or unique_violation then null;
    end;
  end loop;
end
$$;

-- All of ours is what the owner of schema_version has, or the login of this migration, in these two
-- schemas, and not as a part of an extension; and in public what this file makes, or Procrastinate:
-- the database may be somebody else's as well. app/migration.py says what this file makes.
do $$
declare
  v_made text[] := nullif(current_setting('baton.made', true), '')::text[];  -- null: all that is there
  v_owners oid[] := array[
    (select relowner from pg_class where oid = 'public.schema_version'::regclass),
    current_user::regrole::oid];
  v_statement text;
begin
  if not (has_schema_privilege('baton_migrate', 'public', 'create')
    and has_database_privilege('baton_migrate', current_database(), 'create')) then
    begin
      execute format('grant create on database %I to baton_migrate', current_database());
      grant usage, create on schema public to baton_migrate;
    exception when insufficient_privilege then
      raise 'Let the owner of the database run: grant create on database % to baton_migrate; '
        'grant create on schema public to baton_migrate;', quote_ident(current_database())
        using errcode = 'insufficient_privilege';
    end;
  end if;
  if has_schema_privilege('public', 'public', 'create') then  -- a database from before PostgreSQL 15
    revoke create on schema public from public;
  end if;

  if (select nspowner from pg_namespace where nspname = 'ops') <> 'baton_migrate'::regrole then
    alter schema ops owner to baton_migrate;
  end if;
  revoke all on schema ops from public, baton_api, baton_worker;
  for v_statement in
    with ours as (
      select 'pg_class'::regclass as catalog, oid, relname as name, relowner as owner,
        relnamespace as namespace,
        format('alter table %s owner to baton_migrate', oid::regclass) as alter_owner,
        format('revoke all on table %s from %%s', oid::regclass) as revoke_all
      from pg_class
      where relkind in ('r', 'p', 'v', 'm')
      union all
      select 'pg_proc'::regclass, oid, proname, proowner, pronamespace,
        format('alter routine %s owner to baton_migrate', oid::regprocedure),
        format('revoke all on routine %s from %%s', oid::regprocedure)
      from pg_proc
      union all
      select 'pg_type'::regclass, t.oid, typname, typowner, typnamespace,
        format('alter type %s owner to baton_migrate', t.oid::regtype), null
      from pg_type t
      left join pg_class c on c.oid = typrelid
      where typtype in ('e', 'd') or relkind = 'c'
      union all
      select 'pg_class'::regclass, s.oid, c.relname, s.relowner, s.relnamespace, null,
        format('revoke all on sequence %s from %%s', s.oid::regclass)
      from pg_class s
      join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = s.oid
        and d.refclassid = 'pg_class'::regclass and d.deptype in ('a', 'i')
      join pg_class c on c.oid = d.refobjid
      where s.relkind = 'S'
    )
    select statement
    from ours o
    cross join lateral (
      select o.alter_owner as statement, 1 as place
      where o.owner <> 'baton_migrate'::regrole
      union all
      select format(o.revoke_all, 'public, baton_api, baton_worker, baton_ops'), 2
    ) s
    where o.namespace in ('public'::regnamespace, 'ops'::regnamespace)
      and o.owner = any (v_owners || 'baton_migrate'::regrole::oid)
      and (v_made is null or o.namespace <> 'public'::regnamespace or o.name = any (v_made)
        or starts_with(o.name, 'procrastinate_'))
      and statement is not null
      and not exists (
        select from pg_depend d
        where d.classid = o.catalog and d.objid = o.oid and d.deptype = 'e')
    order by place
  loop
    execute v_statement;
  end loop;
end
$$;

-- Lets roles call functions of the schema public by their names, all of each name that are ours.
create or replace function let_call(p_roles text, variadic p_names text[]) returns void
language plpgsql as $$
declare
  v_name text;
  v_function regprocedure;
begin
  foreach v_name in array p_names loop
    for v_function in
      select oid from pg_proc
      where pronamespace = 'public'::regnamespace and proname = v_name
        and proowner = 'baton_migrate'::regrole
    loop
      execute format(
        'alter function %s security definer set search_path = public, pg_temp', v_function);
      execute format('grant execute on function %s to %s', v_function, p_roles);
    end loop;
    if not found then
      raise 'let_call: there is no function %.', v_name;
    end if;
  end loop;
end
$$;

-- What all three do: read the clock, and sweep (app/sweeper.py).
grant execute on function baton_now(), clock_offset() to baton_api, baton_worker, baton_ops;
grant select on schema_version to baton_api, baton_worker, baton_ops;
grant select on leases to baton_api, baton_worker;
select let_call('baton_api, baton_worker',
  'sweepable', 'sweep_job', 'wake_due', 'reconcile_jobs', 'reconcile_tickets', 'wake_held',
  'hold_reason', 'count_usage', 'pull_events');

-- The API. Whose a key is, what it has used and what signs a webhook it learns from functions.
grant select on
  project_access, projects, organizations, members, sources, flows, events, event_facets,
  jobs, job_objects, job_events, deleted_jobs, handoffs, insights, webhook_endpoints,
  webhook_deliveries
  to baton_api;
grant execute on function milliseconds(timestamptz, timestamptz) to baton_api;  -- of job_objects
grant select (user_id, key, job_id) on idempotency_keys to baton_api;
-- For its metrics.
grant select (last_heartbeat) on procrastinate_workers to baton_api;
grant usage on schema ops to baton_api;
grant select on ops.queue_depth to baton_api;
grant execute on function ago(timestamptz) to baton_api;
grant update (status, updated_at) on handoffs, insights to baton_api;
select let_call('baton_api',
  'check_states', 'admit', 'revoked_keys', 'take_wait_slot', 'keep_wait_slots', 'assert_project', 'ingest_events',
  'submit_job', 'cancel_job', 'retry_job', 'delete_job',
  'create_webhook', 'update_webhook', 'delete_webhook', 'rotate_webhook_secret',
  'read_webhook_secret', 'attempts_of', 'replay_webhook', 'chat_accounts',
  'hook_integrations', 'store_hook_deliveries', 'count_hooks');
grant select on integrations, integration_access, integration_objects, resources to baton_api;
select let_call('baton_api',
  'create_integration', 'update_integration', 'rotate_integration', 'delete_integration',
  'set_resources', 'set_project_scope');
select let_call('baton_api, baton_worker',
  'read_integration_token', 'keep_first_secret');
select let_call('baton_api', 'set_digest_schedule', 'delete_digest_schedule');
grant select on digest_schedules, digest_channels to baton_api;

-- The workers. Procrastinate's own statements write the tickets.
grant select, insert, update, delete on
  procrastinate_jobs, procrastinate_workers, procrastinate_events, procrastinate_periodic_defers
  to baton_worker;
grant usage on sequence
  procrastinate_jobs_id_seq, procrastinate_events_id_seq, procrastinate_periodic_defers_id_seq
  to baton_worker;
grant select (id, name, owner_id) on projects to baton_worker;
grant select (id, plan) on users to baton_worker;
grant select (name, models) on plans to baton_worker;
grant select (id, kind, attempt, outcome, error_code) on jobs to baton_worker;
grant select on events, event_facets to baton_worker;
grant select (id, project_id, status, scope, period_end, created_at) on handoffs to baton_worker;
select let_call('baton_worker',
  'claim_job', 'renew_leases', 'report_progress', 'record_calls', 'complete_job', 'fail_job',
  'release_job', 'park_job', 'hold_job', 'crash_job', 'unknown_tickets', 'beat', 'stop_worker',
  'apply_retention', 'search_events', 'enter_events',
  'claim_webhooks', 'webhook_attempted', 'release_webhook',
  'waiting_integrations', 'take_deliveries', 'end_deliveries', 'take_nameless', 'name_it', 'names_in');
select let_call('baton_worker', 'submit_digest', 'claim_chat_messages', 'chat_attempted',
  'release_chat_message');

-- A person. Neither digests of keys nor what signs webhooks; all changes are functions of ops.
grant usage on schema ops to baton_ops;
grant execute on function  -- which views call, as their reader
  milliseconds(timestamptz, timestamptz), month_of(timestamptz), job_of_ticket(jsonb),
  seconds_since(timestamptz), ago(timestamptz), minute_of(timestamptz), usage_counted_until()
  to baton_ops;
grant select on all tables in schema ops to baton_ops;
grant execute on all functions in schema ops to baton_ops;
select let_call('baton_ops',
  'ingest_events', 'assert_project', 'save_import_cursor',  -- `baton import`
  'stored_secrets', 'rekey_secrets',  -- `baton integration rekey`
  'live_secrets',  -- `baton integration secret`
  'hold_reason');

do $$
declare
  v_name regclass;
  v_function regprocedure;
  v_secret constant text[] := '{
    api_keys.digest, webhook_secrets.secret, integration_secrets.value, waiting_deliveries.headers,
    waiting_deliveries.body}';
begin
  -- Procrastinate's functions are called by its own code.
  for v_function in
    select oid from pg_proc
    where pronamespace = 'public'::regnamespace and proname ~ '^procrastinate_'
      and proowner = 'baton_migrate'::regrole
  loop
    execute format('grant execute on function %s to baton_worker', v_function);
  end loop;
  for v_name in
    select oid from pg_class
    where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v')
      and relowner = 'baton_migrate'::regrole
  loop
    execute (
      select format('grant select %s on %s to baton_ops',
        case when bool_or(secret) then
          '(' || string_agg(quote_ident(attname), ', ') filter (where not secret) || ')' end,
        v_name)
      from (
        select attname, v_name || '.' || attname = any (v_secret) as secret
        from pg_attribute
        where attrelid = v_name and attnum > 0 and not attisdropped
      ) a);
  end loop;
  for v_function in
    select oid from pg_proc where pronamespace = 'ops'::regnamespace and not prosecdef
  loop
    execute format(
      'alter function %s security definer set search_path = public, pg_temp', v_function);
  end loop;
end
$$;
drop function let_call;

insert into installation (identity) values (database_identity()) on conflict do nothing;
