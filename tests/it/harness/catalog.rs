//! The proof that two databases are made alike: every object with its definition, owner, rights, comment and state.
//!
//! Independent of the product and of pg_dump on purpose: both sides' catalogs are read with queries of our own, one line
//! for each fact, and the lines are compared. What two major versions print differently for the same is left out where
//! they differ, and only there.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::database::{Database, rows};

/// What makes a definition's text depend on the definition alone.
const PIN: &str = "
    set datestyle = 'ISO, YMD';
    set intervalstyle = 'postgres';
    set timezone = 'UTC';
    set extra_float_digits = 3;
    set search_path = 'pg_catalog';
    set quote_all_identifiers = off;
    set statement_timeout = 0;
    begin isolation level repeatable read read only";

/// An owner and rights, for any catalog. Before they are first changed, rights are not written down; MAINTAIN came in 17.
const RIGHTS: &str = "(select string_agg(format('%s=%s%s', coalesce(gr.rolname, 'public'), a.privilege_type,
        case when a.is_grantable then '*' end), ' ' order by 1, 2, a.is_grantable)
    from (select distinct grantee, privilege_type, is_grantable from aclexplode(ACL)) a
    left join pg_roles gr on gr.oid = a.grantee where a.privilege_type <> 'MAINTAIN')";

/// Namespaces that are the user's.
const USERS: &str = "n.nspname <> 'information_schema' and n.nspname <> 'pgtandem' and n.nspname !~ '^pg_'";

/// One query for each kind of object: a line of text for each fact. `NOT_OF_AN_EXTENSION(catalog, oid)` is filled in below.
const FACTS: [&str; 18] = [
    // Schemas. `public` has another owner and other rights from 15 on.
    "select format('schema %I owner %s rights %s', n.nspname, n.nspowner::regrole, RIGHTS(n.nspacl, 'n', n.nspowner))
       from pg_namespace n where USERS and n.nspname <> 'public'",
    // Relations of every kind.
    "select format('relation %I.%I kind %s persistence %s owner %s identity %s row security %s/%s options %s method %s partition %s of %s by %s inherits %s rights %s',
            n.nspname, c.relname, c.relkind, c.relpersistence, c.relowner::regrole, c.relreplident, c.relrowsecurity, c.relforcerowsecurity,
            c.reloptions, am.amname, pg_get_expr(c.relpartbound, c.oid), c.relispartition,
            case c.relkind when 'p' then pg_get_partkeydef(c.oid) end,
            (select string_agg(inhparent::regclass::text, ' ' order by inhseqno) from pg_inherits where inhrelid = c.oid),
            RIGHTS(c.relacl, case c.relkind when 'S' then 's' else 'r' end, c.relowner))
       from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_am am on am.oid = c.relam
      where c.relkind in ('r', 'p', 'v', 'm', 'f', 'S', 'c') and c.relpersistence <> 't' and USERS and OURS('pg_class', c.oid)",
    // Columns, in their order; those that are inherited come first after pg_dump. Partitions share the identity of their root from 17 on.
    "select format('column %I.%I.%I number %s type %s not null %s default %s identity %s generated %s collation %s storage %s statistics %s local %s parents %s options %s rights %s',
            n.nspname, c.relname, a.attname, 
            case when c.relispartition or not exists (select from pg_inherits where inhrelid = c.oid) then row_number() over (partition by c.oid order by a.attnum) end, format_type(a.atttypid, a.atttypmod), a.attnotnull,
            pg_get_expr(d.adbin, d.adrelid), case when not c.relispartition then a.attidentity end, a.attgenerated, nullif(a.attcollation, t.typcollation)::regcollation,
            a.attstorage, nullif(coalesce(a.attstattarget, -1), -1), a.attislocal, a.attinhcount, a.attoptions,
            RIGHTS(a.attacl, 'c', c.relowner))
       from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
       join pg_type t on t.oid = a.atttypid
       left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
      where a.attnum > 0 and not a.attisdropped and c.relkind in ('r', 'p', 'v', 'm', 'f', 'c') and c.relpersistence <> 't'
        and USERS and OURS('pg_class', c.oid)",
    // Constraints of tables and domains; a foreign key is told by its root, since those below have names that the server made up. NOT NULL is a constraint from 18 on; the columns tell.
    "select format('constraint %I on %s%s validated %s local %s parents %s noinherit %s', con.conname, coalesce(nullif(con.conrelid, 0)::regclass::text, con.contypid::regtype::text),
            ' ' || pg_get_constraintdef(con.oid), con.convalidated, con.conislocal, con.coninhcount, con.contype = 'c' and con.connoinherit)
       from pg_constraint con join pg_namespace n on n.oid = con.connamespace
      where con.contype <> 'n' and not (con.contype = 'f' and con.conparentid <> 0) and USERS and OURS('pg_class', con.conrelid) and OURS('pg_type', con.contypid)",
    "select format('index %s on %s valid %s ready %s identity %s clustered %s statistics %s', pg_get_indexdef(i.indexrelid), i.indrelid::regclass, i.indisvalid, i.indisready,
            i.indisreplident, i.indisclustered,
            (select string_agg(attnum || ':' || attstattarget, ' ' order by attnum) from pg_attribute where attrelid = i.indexrelid and attstattarget >= 0))
       from pg_index i join pg_class c on c.oid = i.indexrelid join pg_namespace n on n.oid = c.relnamespace
      where USERS and OURS('pg_class', i.indrelid)",
    // Triggers of the user, also those of partitions; of a foreign key over partitions each version makes others; those of keys by what they belong to, for their names hold oids.
    "select format('trigger %s on %s state %s %s', case when con.contype in ('f', 'p', 'u', 'x') then 'of ' || con.conname || ' kind ' || t.tgtype else t.tgname end,
            t.tgrelid::regclass, t.tgenabled, case when con.contype in ('f', 'p', 'u', 'x') then null else pg_get_triggerdef(t.oid) end)
       from pg_trigger t join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
       left join pg_constraint con on con.oid = t.tgconstraint
       join pg_proc p on p.oid = t.tgfoid join pg_namespace pn on pn.oid = p.pronamespace
      where pn.nspname <> 'pgtandem' and (con.contype is distinct from 'f' or con.conparentid = 0 and c.relkind <> 'p') and USERS and OURS('pg_class', c.oid)",
    "select format('rule %I on %s state %s event %s instead %s%s', r.rulename, r.ev_class::regclass, r.ev_enabled, r.ev_type, r.is_instead, SAME_VERSION(' ' || pg_get_ruledef(r.oid)))
       from pg_rewrite r join pg_class c on c.oid = r.ev_class join pg_namespace n on n.oid = c.relnamespace
      where USERS and OURS('pg_class', c.oid)",
    "select format('policy %I on %s command %s permissive %s roles %s using %s check %s', p.polname, p.polrelid::regclass, p.polcmd, p.polpermissive,
            (select string_agg(coalesce(rolname, 'public'), ' ' order by rolname) from unnest(p.polroles) r(oid) left join pg_roles on pg_roles.oid = r.oid),
            pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
       from pg_policy p",
    "select format('sequence %I.%I type %s start %s step %s from %s to %s cache %s cycle %s owned by %s', n.nspname, c.relname, s.seqtypid::regtype, s.seqstart, s.seqincrement,
            s.seqmin, s.seqmax, s.seqcache, s.seqcycle,
            (select format('%s.%I %s', d.refobjid::regclass, a.attname, d.deptype) from pg_depend d
               join pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
              where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.refclassid = 'pg_class'::regclass and d.deptype in ('a', 'i')))
       from pg_sequence s join pg_class c on c.oid = s.seqrelid join pg_namespace n on n.oid = c.relnamespace
      where USERS and OURS('pg_class', c.oid)",
    "select format('type %I.%I kind %s owner %s base %s not null %s default %s collation %s labels %s range of %s rights %s', n.nspname, t.typname, t.typtype, t.typowner::regrole,
            case t.typtype when 'd' then format_type(t.typbasetype, t.typtypmod) end, t.typnotnull, t.typdefault, nullif(t.typcollation, 0)::regcollation,
            (select array_agg(enumlabel order by enumsortorder) from pg_enum where enumtypid = t.oid),
            (select rngsubtype::regtype from pg_range where rngtypid = t.oid), RIGHTS(t.typacl, 'T', t.typowner))
       from pg_type t join pg_namespace n on n.oid = t.typnamespace
      where t.typtype in ('d', 'e', 'r', 'c') and USERS and OURS('pg_type', t.oid)
        and (t.typrelid = 0 or exists (select from pg_class where oid = t.typrelid and relkind = 'c'))",
    "select format('function %s kind %s owner %s rights %s %s', p.oid::regprocedure, p.prokind, p.proowner::regrole, RIGHTS(p.proacl, 'f', p.proowner),
            case when p.prokind <> 'a' then pg_get_functiondef(p.oid) end)
       from pg_proc p join pg_namespace n on n.oid = p.pronamespace where USERS and OURS('pg_proc', p.oid)
        and not exists (select from pg_depend i where i.classid = 'pg_proc'::regclass and i.objid = p.oid and i.deptype = 'i')",
    "select format('statistics %s owner %s target %s', pg_get_statisticsobjdef(s.oid), s.stxowner::regrole, nullif(coalesce(s.stxstattarget, -1), -1))
       from pg_statistic_ext s",
    "select format('event trigger %I on %s state %s runs %s owner %s', evtname, evtevent, evtenabled, evtfoid::regproc, evtowner::regrole) from pg_event_trigger
      where not exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace where p.oid = evtfoid and n.nspname = 'pgtandem')",
    "select format('extension %I in %I', e.extname, n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace",
    "select format('default privileges of %s in %s for %s: %s', defaclrole::regrole, coalesce(n.nspname, 'any'), defaclobjtype,
            (select string_agg(format('%s=%s', coalesce(gr.rolname, 'public'), a.privilege_type), ' ' order by 1)
               from aclexplode(defaclacl) a left join pg_roles gr on gr.oid = a.grantee where a.privilege_type <> 'MAINTAIN'))
       from pg_default_acl left join pg_namespace n on n.oid = defaclnamespace",
    // Comments on anything, by the name of what they are on.
    "select format('comment on %s %s: %s', i.type, i.identity, d.description)
       from pg_description d, lateral pg_identify_object(d.classoid, d.objoid, d.objsubid) i
      where d.objoid >= 16384 and i.schema is distinct from 'pgtandem' and i.identity !~ '^pgtandem' and OURS('ANY', d.objoid)",
    // Kinds that are told by their names: casts, operators, collations, text search, languages. Multiranges
    // came in 14, with their ranges.
    "select format('%s %s', i.type, i.identity)
       from (select 'pg_cast'::regclass::oid as class, oid from pg_cast union all select 'pg_operator'::regclass, oid from pg_operator
             union all select 'pg_opclass'::regclass, oid from pg_opclass union all select 'pg_opfamily'::regclass, oid from pg_opfamily
             union all select 'pg_collation'::regclass, oid from pg_collation union all select 'pg_conversion'::regclass, oid from pg_conversion
             union all select 'pg_ts_config'::regclass, oid from pg_ts_config union all select 'pg_ts_dict'::regclass, oid from pg_ts_dict
             union all select 'pg_ts_parser'::regclass, oid from pg_ts_parser union all select 'pg_ts_template'::regclass, oid from pg_ts_template
             union all select 'pg_language'::regclass, oid from pg_language union all select 'pg_foreign_data_wrapper'::regclass, oid from pg_foreign_data_wrapper
             union all select 'pg_foreign_server'::regclass, oid from pg_foreign_server) o,
            lateral pg_identify_object(o.class, o.oid, 0) i
      where o.oid >= 16384 and i.identity !~ 'multirange' and OURS('ANY', o.oid)",
    "select format('view %s %s', c.oid::regclass, SAME_VERSION(pg_get_viewdef(c.oid)))
       from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('v', 'm') and USERS and OURS('pg_class', c.oid)",
];

/// Panics with every fact that holds on one side only.
pub async fn assert_same_catalog(source: &Database, target: &Database) {
    let found = catalog_differences(source, target).await;
    assert!(found.is_empty(), "the catalogs of source and target differ:\n{}", found.join("\n"));
}

/// Every fact that holds on one side only.
pub async fn catalog_differences(source: &Database, target: &Database) -> Vec<String> {
    let (source, target) = (open(source).await, open(target).await);
    let same_version = major(&source).await == major(&target).await;
    let mut found = Vec::new();
    for query in FACTS {
        let sql = fill_in(query, same_version);
        let ours: BTreeSet<String> = rows(&source, &sql).await.into_iter().collect();
        let theirs: BTreeSet<String> = rows(&target, &sql).await.into_iter().collect();
        found.extend(ours.difference(&theirs).map(|fact| format!("only on the source: {fact}")));
        found.extend(theirs.difference(&ours).map(|fact| format!("only on the target: {fact}")));
    }
    found
}

async fn open(database: &Database) -> Client {
    let client = database.connect().await;
    client.batch_execute(PIN).await.expect("pin the settings");
    client
}

async fn major(client: &Client) -> String {
    rows(client, "select current_setting('server_version_num')::int / 10000").await.join("")
}

fn fill_in(query: &str, same_version: bool) -> String {
    let mut sql = query.replace("USERS", USERS);
    sql = replace_call(&sql, "RIGHTS(", |arguments| {
        let [acl, kind, owner] = arguments else { panic!("RIGHTS takes an ACL, a kind and an owner") };
        RIGHTS.replace("ACL", &format!("coalesce({acl}, acldefault(({kind})::\"char\", {owner}))"))
    });
    sql = replace_call(&sql, "OURS(", |arguments| {
        let [class, oid] = arguments else { panic!("OURS takes a catalog and an oid") };
        let class = if *class == "'ANY'" { String::new() } else { format!("dep.classid = {class}::regclass and ") };
        format!("not exists (select from pg_depend dep where {class}dep.objid = {oid} and dep.deptype = 'e')")
    });
    replace_call(&sql, "SAME_VERSION(", |arguments| if same_version { arguments.join(", ") } else { "null".to_owned() })
}

/// Replaces each `name(a, b)`, whose arguments may hold parentheses.
fn replace_call(sql: &str, name: &str, by: impl Fn(&[&str]) -> String) -> String {
    let mut out = String::new();
    let mut rest = sql;
    while let Some((before, after)) = rest.split_once(name) {
        let (mut depth, mut arguments, mut start, mut end) = (0, Vec::new(), 0, 0);
        for (at, c) in after.char_indices() {
            match c {
                '(' => depth += 1,
                ')' if depth == 0 => {
                    end = at;
                    break;
                }
                ')' => depth -= 1,
                ',' if depth == 0 => {
                    arguments.push(after[start..at].trim());
                    start = at + 1;
                }
                _ => {}
            }
        }
        arguments.push(after[start..end].trim());
        out += before;
        out += &by(&arguments);
        rest = &after[end + 1..];
    }
    out + rest
}
