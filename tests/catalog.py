"""A database's catalog as text, piece by piece, so that two databases can be told apart.

Whatever an upgrade could leave behind is in it: tables and their columns, constraints, indexes,
functions, triggers, views, types, policies, comments, owners and grants. The order of columns is
not: a column that was added stands last.
"""

import difflib

import asyncpg

_ACL = "(select string_agg(a::text, ' ' order by a::text) from unnest({}) a)"
# Each answers a name and what there is to say of it. {of} is what restricts it to our schemas.
PIECES = f"""
select format('schema %s', n.nspname),
  concat_ws(' ', pg_get_userbyid(nspowner), {_ACL.format("nspacl")}, obj_description(n.oid))
from pg_namespace n where n.nspname in ('public', 'ops')

union all
select format('relation %s', c.oid::regclass),
  concat_ws(' ', relkind, relpersistence,
    (select array_agg(o order by o) from unnest(reloptions) o), pg_get_userbyid(relowner),
    {_ACL.format("relacl")}, relrowsecurity, relforcerowsecurity,
    obj_description(c.oid, 'pg_class'),
    case when relkind in ('v', 'm') then pg_get_viewdef(c.oid) end)
from pg_class c join pg_namespace n on n.oid = relnamespace
where n.nspname in ('public', 'ops') and relkind not in ('i', 'I')

union all
select format('column %s.%s', c.oid::regclass, attname),
  concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated,
    attcollation::regcollation, attstorage, attcompression, pg_get_expr(adbin, adrelid),
    {_ACL.format("attacl")}, col_description(c.oid, attnum))
from pg_attribute
join pg_class c on c.oid = attrelid and relkind in ('r', 'p', 'v', 'm', 'c')
join pg_namespace n on n.oid = relnamespace
left join pg_attrdef on adrelid = attrelid and adnum = attnum
where n.nspname in ('public', 'ops') and attnum > 0 and not attisdropped

union all
select format('constraint %s of %s', conname, conrelid::regclass),
  concat_ws(' ', pg_get_constraintdef(k.oid), convalidated, condeferrable)
from pg_constraint k join pg_namespace n on n.oid = connamespace
where n.nspname in ('public', 'ops') and conrelid <> 0

union all
select format('index %s', indexrelid::regclass),
  concat_ws(' ', pg_get_indexdef(indexrelid), indisvalid, indisready, indisunique,
    (select reloptions from pg_class where oid = indexrelid))
from pg_index i join pg_class c on c.oid = indrelid join pg_namespace n on n.oid = relnamespace
where n.nspname in ('public', 'ops')

union all
select format('function %s', p.oid::regprocedure),
  concat_ws(' ', pg_get_functiondef(p.oid), pg_get_userbyid(proowner), {_ACL.format("proacl")},
    obj_description(p.oid, 'pg_proc'))
from pg_proc p join pg_namespace n on n.oid = pronamespace
where n.nspname in ('public', 'ops') and prokind in ('f', 'p')

union all
select format('trigger %s of %s', tgname, tgrelid::regclass),
  concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled)
from pg_trigger t where not tgisinternal

union all
select format('type %s', t.oid::regtype),
  concat_ws(' ', typtype, pg_get_userbyid(typowner),
    (select array_agg(enumlabel order by enumsortorder) from pg_enum where enumtypid = t.oid))
from pg_type t join pg_namespace n on n.oid = typnamespace
where n.nspname in ('public', 'ops') and typtype in ('e', 'd')

union all
select format('policy %s of %s', polname, polrelid::regclass),
  concat_ws(' ', polcmd, polpermissive,
    (select array_agg(r::regrole::text) from unnest(polroles) r),
    pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid))
from pg_policy

union all
select format('default privileges %s %s', defaclnamespace::regnamespace, defaclobjtype),
  concat_ws(' ', pg_get_userbyid(defaclrole), {_ACL.format("defaclacl")})
from pg_default_acl

order by 1, 2
"""


async def catalog(connection: asyncpg.Connection) -> list[str]:
    """The catalog, a few lines for each piece."""
    lines: list[str] = []
    for name, told in await connection.fetch(PIECES):
        lines += [f"{name}:", *(f"    {line}" for line in told.splitlines())]
    return lines


def difference(one: list[str], other: list[str]) -> str:
    """What differs, for a person; empty when nothing does."""
    return "\n".join(difflib.unified_diff(one, other, lineterm="", n=2))
