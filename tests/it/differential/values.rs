//! Values: whatever the source prints, the target reads as the same.

use super::case::{Case, Role, cut_over, following, number};
use crate::harness::{Cluster, PATIENCE, Pgtandem, assert_same, versions_under_test};

const VALUES: &str = include_str!("content/values.sql");
const VALUES_CHANGES: &str = include_str!("content/values_changes.sql");

/// Settings of a role that would change how values print or read, and how long a statement may take.
const HOSTILE_SETTINGS: [(&str, &str); 19] = [
    ("DateStyle", "German, DMY"),
    ("IntervalStyle", "sql_standard"),
    ("TimeZone", "Asia/Kathmandu"),
    ("extra_float_digits", "-2"),
    ("bytea_output", "escape"),
    ("lc_monetary", "C.UTF-8"),
    ("xmloption", "document"),
    ("search_path", "v, pg_catalog"),
    ("standard_conforming_strings", "off"),
    ("escape_string_warning", "off"),
    ("statement_timeout", "100ms"),
    ("lock_timeout", "1ms"),
    ("idle_in_transaction_session_timeout", "50ms"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("quote_all_identifiers", "on"),
    ("session_replication_role", "origin"),
    ("row_security", "on"),
];

#[tokio::test]
async fn every_value_arrives_as_it_was() {
    Case::new("values").schema(VALUES).script(VALUES_CHANGES).covering(&[1, 2]).moves().await;
}

#[tokio::test]
async fn the_settings_of_the_role_change_nothing() {
    let case = Case::new("role_settings").schema(VALUES).script(VALUES_CHANGES).covering(&[0]).only(Role::Superuser);
    case.role_settings(&HOSTILE_SETTINGS).moves().await;
}

/// What the servers and the databases say, on top of the role.
#[tokio::test]
async fn the_settings_of_servers_and_databases_change_nothing() {
    let prepare = "do $$ begin
        execute format('alter database %I set IntervalStyle = iso_8601', current_database());
        execute format('alter database %I set row_security = off', current_database());
        execute format('alter database %I set lock_timeout = ''1ms''', current_database());
        execute format('alter database %I set default_transaction_isolation = serializable', current_database());
    end $$";
    let case = Case::new("server_settings").schema(VALUES).script(VALUES_CHANGES).prepared_by(prepare).covering(&[3]);
    let case = case.server_setting("DateStyle", "SQL, DMY").server_setting("TimeZone", "America/St_Johns");
    let case = case.server_setting("extra_float_digits", "-15").server_setting("bytea_output", "escape");
    case.server_setting("xmlbinary", "hex").server_setting("escape_string_warning", "off").moves().await;
}

/// The rows of `allowed` must be there before those that are checked against it, however large each table is.
#[tokio::test]
async fn checks_that_read_other_tables_hold() {
    let schema = "
        create table allowed (v text primary key);
        create function is_allowed(v text) returns boolean language sql stable as
            'select exists (select from public.allowed a where a.v = $1)';
        create domain known as text check (is_allowed(value));
        create domain known_too as known;
        create type with_known as (a int, k known_too);
        create table by_domain (id int primary key, v known, filler text);
        create table by_array (id int primary key, v known_too[], w with_known);
        create table by_check (id int primary key, v text check (is_allowed(v)));
        insert into allowed select 'v' || i from generate_series(1, 5) i;
        insert into by_domain select i, 'v' || (1 + i % 5), repeat('x', 500) from generate_series(1, 2000) i;
        insert into by_array select i, array['v1', 'v' || (1 + i % 5)], ('(' || i || ',v2)')::with_known from generate_series(1, 2000) i;
        insert into by_check select id, v from by_domain;";
    let script = "
        insert into allowed values ('new ROUND');
        update by_domain set v = 'new ROUND' where id % 3 = ROUND - 1;
        update by_array set v = v || array['new ROUND'::known_too], w.k = 'new ROUND' where id % 3 = ROUND - 1;
        insert into by_check values (10000 + ROUND, 'new ROUND');
        delete from by_check where id = ROUND;";
    Case::new("checks").schema(schema).script(script).covering(&[1, 2]).moves().await;
}

/// Types that are not in every version or not in the server itself, also as keys. pgvector is not provided for the tests.
#[tokio::test]
async fn multiranges_and_types_of_extensions_arrive() {
    let schema = r#"
        create schema ext;
        create extension ltree schema ext; create extension cube schema ext; create extension isn schema ext;
        create extension seg schema ext; create extension hstore schema ext; create extension citext schema ext;
        create table spans (k int4multirange primary key, a nummultirange, b tstzmultirange[], c datemultirange, n int default 0);
        insert into spans values ('{}', '{(,)}', '{"{}",NULL}', '{[2024-01-01,2024-02-01),[2024-03-01,)}'), ('{[1,2),[5,9)}', '{[1.10,1.1]}', NULL, '{}');
        create table trees (k ext.ltree primary key, a ext.lquery, n int default 0);
        insert into trees values ('', '*'), ('a.b_1.c', 'a.*{1,2}.!b');
        create table maps (k ext.hstore primary key, a ext.hstore[], n int default 0);
        insert into maps values ('', '{}'), ('"x=>y"=>"\"\\", n=>NULL', '{"a=>1",NULL,""}');
        create table words (k ext.citext primary key, a ext.citext[], n int default 0);
        insert into words values ('MiXed', '{A,a,NULL}'), ('', '{}');
        create table books (k ext.isbn13 primary key, a ext.seg, b ext.cube, n int default 0);
        insert into books values ('978-0-393-04002-9', '6.25(+-)0.50', '(1,2,3),(-0,1e300,0.1)');
        create table odd (k int primary key, a txid_snapshot, b tid, c xid8, d pg_snapshot, e regtype, f oidvector, g int2vector, h "char"[], i name[], j aclitem[], l refcursor);
        insert into odd values (1, '1:10:3,5', '(4294967295,65535)', '18446744073709551615', '1:9:2', 'pg_catalog.int4', '1 2', '', '{x,\\}', '{"a b"}', '{}', 'c');"#;
    let mut script = String::new();
    for table in ["spans", "trees", "maps", "words", "books"] {
        script += &format!(
            "update {table} set n = n + 1; update {table} set a = (select a from {table} order by k limit 1) where n % 2 = 0;\n"
        );
    }
    // A key that is equal and does not look the same, and keys that go and come again.
    script += r#"
        update ext_words set k = upper(k::text) where ROUND = 2;
        with gone as (delete from spans where k = '{}' returning *) insert into spans select k, a, b, c, 10 * ROUND from gone;
        delete from maps where k = ''; insert into maps values ('', NULL, ROUND);
        update trees set k = k OPERATOR(ext.||) 'ROUND' where k <> '';
        update odd set b = '(ROUND,1)', f = NULL, e = 'pg_catalog.text';"#;
    let script = script
        .replace("ext_words", "words")
        .replace("k <> ''", "k::text <> ''")
        .replace("where k = '';", "where k::text = '';");
    let case = Case::new("extensions").schema(schema).script(&script).since_version(14);
    case.covering(&[0, 4]).moves().await;
}

/// A value of this many megabytes passes through the daemon without making it hold many of them at a time.
#[tokio::test]
async fn large_values_do_not_pile_up_in_memory() {
    let megabytes = number("PGTANDEM_TEST_VALUE_MB").unwrap_or(10);
    let schema = "
        create table large (id int primary key, v text, b bytea, n int);
        alter table large alter v set storage external, alter b set storage external;
        insert into large select i, repeat('0123456789abcdef', MB * 65536), decode(repeat('00ff5c27', MB * 131072), 'hex'), 0
          from generate_series(1, 4) i;";
    let script = "
        update large set n = n + 1;
        update large set v = repeat('fedcba98ROUND', MB * 90000) where id <= 2;
        insert into large select 10 * ROUND + i, repeat('x', MB * 1048576), '', 0 from generate_series(1, 4) i;";
    let fill = |text: &str| text.replace("MB", &megabytes.to_string());
    let case = Case::new("large").schema(&fill(schema)).script(&fill(script)).covering(&[1]);
    case.moves_and(async |moved| {
        // A message in hand, the next one read, and what is encoded for the target; not one for each row.
        let limit = 256 + 5 * megabytes;
        let peak = moved.peak_memory() >> 20;
        println!("the daemon held {peak} MB at most, values are of {megabytes} MB");
        assert!(peak < limit, "the daemon held {peak} MB for values of {megabytes} MB");
    })
    .await;
}

#[tokio::test]
async fn a_database_that_is_not_unicode_moves_to_one_of_its_kind() {
    let (one, two) = versions_under_test();
    for (encoding, locale) in [("LATIN1", "C"), ("EUC_JP", "C")] {
        let cluster = |version| Cluster::builder(version).encoding(encoding).locale(locale).start();
        let (source, target) = tokio::join!(cluster(one), cluster(two));
        let (from, to) = (source.create_database("app").await, target.create_database("app").await);
        let text = if encoding == "EUC_JP" { "日本語の表" } else { "größe é ½" };
        from.execute(&format!("create table \"{text}\" (\"{text}\" text primary key, n int); insert into \"{text}\" values ('{text}', 0), ('', 0)")).await;
        let pgtandem = Pgtandem::new(&from, &to, "encoding");
        let mut daemon = pgtandem.spawn(&["run"]);
        following(&mut daemon, PATIENCE).await;
        from.execute(&format!("update \"{text}\" set n = 1; insert into \"{text}\" values ('2 {text}', 2); delete from \"{text}\" where n = 1 and \"{text}\" = ''")).await;
        cut_over(&pgtandem, daemon).await;
        assert_same(&from, &to).await;
        let bytes = format!("select encode(convert_to(\"{text}\", '{encoding}'), 'hex') from \"{text}\" order by n");
        assert_eq!(to.query_strings(&bytes).await, from.query_strings(&bytes).await, "{encoding}");
    }
}

#[tokio::test]
async fn bytes_that_are_no_text_are_refused_with_their_table() {
    let (one, two) = versions_under_test();
    let cluster = |version| Cluster::builder(version).encoding("SQL_ASCII").start();
    let (source, target) = tokio::join!(cluster(one), cluster(two));
    let (from, to) = (source.create_database("app").await, target.create_database("app").await);
    from.execute(r"create table fine (v text); insert into fine values ('äscii'); create table broken (v text); insert into broken values (E'\xff\xfe')").await;
    let refused = Pgtandem::new(&from, &to, "ascii").run(&["run", "--until", "copy"]).await;
    assert!(refused.code.is_some_and(|code| code != 0), "{refused}");
    assert!(refused.stderr.contains("sql_ascii"), "preflight names it: {refused}");
    assert!(refused.stderr.contains("public.broken") && refused.stderr.contains("invalid byte sequence"), "{refused}");
    // Moved by hand around it, the rest goes on.
    from.execute("update broken set v = 'mended'").await;
    let done = Pgtandem::new(&from, &to, "ascii").run(&["run", "--cutover-when-ready"]).await;
    assert_eq!(done.code, Some(0), "{done}");
    assert_same(&from, &to).await;
}
