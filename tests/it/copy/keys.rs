//! Large tables in ranges of their keys: what a source does that cannot read ranges of blocks.

use super::*;

/// Tables whose rows lie in the order of their keys, and others.
const KEYED: &str = r#"
    create extension citext;
    create domain short as varchar(40) check (value <> '');
    create type step as enum ('last', 'first', 'middle');
    create table by_number (id bigint primary key, v text);
    create table "by ""text"", two" ("the ""key""" text collate "C", n int, v text, primary key ("the ""key""", n));
    create table folded (k citext primary key, v text);
    create table constrained (k short primary key, v text);
    create table sorted (k text collate "und-x-icu" primary key, v text);
    create table by_default (k text primary key, v text);
    create table labelled (s step, n int, v text, primary key (s, n));
    create table by_padded (k char(12) collate "POSIX" primary key, v text);
    create table by_bytes (k bytea primary key, v text);
    create table by_time (at timestamptz, n numeric(10, 2), v text, primary key (at, n));
    create table by_identity (k int not null, other int, v text);
    create unique index by_identity_k on by_identity (k desc);
    alter table by_identity replica identity using index by_identity_k;
    create table parted (id int primary key, v text) partition by range (id);
    create table part partition of parted default;
    create table by_few (k int, n int, v text, primary key (k, n));
    create table by_chance (k uuid primary key, v text);
    create table large_by_chance (k uuid primary key, v text);
    alter table large_by_chance alter v set storage external;
    create table one_key (k smallint, n int, v text, primary key (k, n));
    create table unkeyed (id int, v text);
    create table other_order (k text not null, v text);
    create unique index other_order_k on other_order (k text_pattern_ops);
    alter table other_order replica identity using index other_order_k;"#;

/// About 4 MB each, in units of 1 MB.
const KEYED_ROWS: &str = r#"
    create temporary table many as
        select i, lpad(i::text, 6, '0') as p, repeat(md5(i::text), 8) as v from generate_series(1, 12000) i;
    insert into by_number select (i - 6000) * 1000000007::bigint, v from many order by i;
    insert into "by ""text"", two" select E'it''s \\ "' || p || E'\n', i, v from many order by i;
    insert into folded select p, v from many;
    insert into constrained select 'd' || p, v from many;
    insert into sorted select p, v from many;
    insert into by_default select p, v from many;
    insert into labelled select 'first', i, v from many;
    insert into by_padded select p, v from many order by i;
    insert into by_bytes select decode(lpad(to_hex(i), 8, '0') || '275c00', 'hex'), v from many order by i;
    insert into by_time select timestamptz '0001-01-01 BC' + i * interval '1 day', i, v from many order by i;
    insert into by_identity select i, i, v from many order by i desc;
    insert into parted select i, v from many order by i;
    insert into by_few select i / 4001, i, v from many order by i;
    insert into by_chance select md5(p)::uuid, v from many;
    insert into large_by_chance select md5(p)::uuid, repeat(v, 16) from many where i % 12 = 0;
    insert into one_key select 1, i, v from many;
    insert into unkeyed select i, v from many;
    insert into other_order select p, v from many;
    analyze;"#;

/// In how many transactions each table arrived.
async fn transactions(moved: &Move) -> BTreeMap<String, usize> {
    let mut transactions = BTreeMap::new();
    for table in moved.states().await.into_keys() {
        let name = table.strip_prefix("public.").unwrap();
        let quoted = format!("\"{}\"", name.replace('"', "\"\""));
        transactions.insert(name.to_owned(), moved.written_by(&quoted).await.len());
    }
    transactions
}

/// Which tables are divided by their keys.
async fn by_keys(moved: &Move) -> Vec<String> {
    moved.target.query_strings("select table_name from pgtandem.copy_table where bounds is not null order by 1").await
}

/// Fills a table of a key and a text with about 4 MB, in the order of its key.
async fn fill(moved: &Move, table: &str, key: &str) {
    let rows = format!("insert into {table} select {key}, repeat(md5(i::text), 8) from generate_series(1, 12000) i");
    moved.source.execute(&rows).await;
}

const IN_UNITS: &[(&str, &str)] = &[("split_above", "1000000"), ("workers", "3")];

async fn from_13() -> (Cluster, Cluster) {
    tokio::join!(Cluster::start(13), Cluster::start(versions_under_test().1))
}

#[tokio::test]
async fn a_source_that_cannot_read_ranges_of_blocks_reads_ranges_of_keys() {
    let moved = Move::configured(from_13().await, KEYED, IN_UNITS).await;
    moved.source.execute(KEYED_ROWS).await;

    assert_eq!(moved.copy().await, Outcome::Complete);

    assert_same(&moved.source, &moved.target).await;
    for (table, transactions) in transactions(&moved).await {
        match table.as_str() {
            "unkeyed" | "other_order" | "folded" | "constrained" | "sorted" | "labelled" => {
                assert_eq!(transactions, 1, "{table}");
            }
            // One value begins all shares: one of them holds all rows.
            "one_key" => assert_eq!(transactions, 1, "{table}"),
            "by_few" => assert_eq!(transactions, 3, "{table}: as many as values"),
            // It is not read more than twice.
            "by_chance" => assert_eq!(transactions, 2, "{table}"),
            _ => assert!((4..=9).contains(&transactions), "{table}: {transactions}"),
        }
    }
    assert_eq!(by_keys(&moved).await, [""; 0], "no value stays in the state");
}

#[tokio::test]
async fn a_key_in_an_order_that_a_library_decides_is_not_divided() {
    let clusters =
        tokio::join!(Cluster::builder(13).locale("C.UTF-8").start(), Cluster::start(versions_under_test().1));
    let schema = "create table by_default (k text primary key, v text);
        create table by_choice (k text collate \"C\" primary key, v text);";
    let moved = Move::configured(clusters, schema, IN_UNITS).await;
    for table in ["by_default", "by_choice"] {
        fill(&moved, table, "lpad(i::text, 6, '0')").await;
    }
    assert_eq!(moved.copy().await, Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
    let transactions = transactions(&moved).await;
    assert_eq!(transactions["by_default"], 1);
    assert!(transactions["by_choice"] >= 4, "{transactions:?}");
}

#[tokio::test]
async fn what_changes_between_two_starts_is_brought_into_ranges_of_keys() {
    let by_number = CHANGING.replace("primary key (a, b)", "primary key (b, a)");
    changes_are_brought_into_units(from_13().await, &by_number).await;
}

#[tokio::test]
async fn a_table_that_is_no_heap_is_read_as_the_planner_would() {
    let schema = "
        create access method other type table handler heap_tableam_handler;
        create table keyed (id int primary key, v text) using other;
        create table unkeyed (id int, v text) using other;
        create table heap (id int, v text);";
    for tid_ranges in [true, false] {
        let moved = Move::configured(Cluster::pair().await, schema, IN_UNITS).await;
        let set = format!("alter database {} set enable_tidscan = {tid_ranges}", moved.source.name());
        moved.source.execute(&set).await;
        read_as_planned(&moved, tid_ranges && versions_under_test().0 >= 14).await;
    }
}

async fn read_as_planned(moved: &Move, tid_ranges: bool) {
    for table in ["keyed", "unkeyed", "heap"] {
        fill(moved, table, "i").await;
    }

    assert_eq!(moved.copy().await, Outcome::Complete);

    assert_same(&moved.source, &moved.target).await;
    let transactions = transactions(moved).await;
    assert_eq!(transactions["unkeyed"] >= 4, tid_ranges, "{transactions:?}");
    assert!(transactions["keyed"] >= 4, "{transactions:?}");
    assert_eq!(transactions["heap"] >= 4, versions_under_test().0 >= 14, "{transactions:?}");
}

/// The planner knows nothing of the first one, and is told nothing good of the second one.
#[tokio::test]
async fn no_range_of_a_key_is_looked_for_in_the_whole_table() {
    let schema = "
        create table unknown (id int primary key, v text);
        create table told (id int primary key, v text);
        alter table unknown set (autovacuum_enabled = off);
        alter table told set (autovacuum_enabled = off);";
    let moved = Move::configured(from_13().await, schema, IN_UNITS).await;
    for table in ["unknown", "told"] {
        fill(&moved, table, "i").await;
    }
    let settings = format!(
        "analyze told; alter database {name} set random_page_cost = 1000; alter database {name} set enable_indexscan = off;
         alter database {name} set enable_bitmapscan = off",
        name = moved.source.name()
    );
    for statement in settings.split(';') {
        moved.source.execute(statement).await;
    }

    assert_eq!(moved.copy().await, Outcome::Complete);

    let scans = "select relname || ' ' || seq_scan from pg_stat_user_tables where idx_scan >= 4 order by 1";
    wait_until("the scans are counted", PATIENCE, async || moved.source.query_strings(scans).await.len() == 2).await;
    // One built the index.
    assert_eq!(moved.source.query_strings(scans).await, ["told 1", "unknown 1"]);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn bounds_stay_what_they_were_when_the_table_was_opened() {
    let mut moved = Move::configured(from_13().await, LARGE, SLOW).await;
    moved.source.execute(LARGE_ROWS).await;
    let bounds = "select bounds from pgtandem.copy_table where table_name = 'large'";
    moved.begin_and_die(async || moved.units("large").await >= 3).await;
    let (there, written) = (moved.target.query_string(bounds).await, moved.written_by("large").await);

    // When most of its rows go, another sample would divide it otherwise.
    moved.source.execute("delete from large where id between 30000 and 180000").await;
    let (walsender, cut) = moved.another_cut().await;
    moved.die_copying(walsender, &cut, async || moved.units("large").await >= 5).await;
    assert_eq!(moved.target.query_string(bounds).await, there);
    moved.context.settings.max_bytes_per_second = 0;
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);

    assert_same(&moved.source, &moved.target).await;
    assert!(!written.is_disjoint(&moved.written_by("large").await), "units stayed");
}
