//! A move with no more rights than `docs/privileges.md` asks for: foreign keys cannot be kept from firing there, and wait.

use super::load::Load;
use super::stage::{Stage, scale};
use super::{GENTLE, finish};
use crate::harness::{PASSWORD, Pgtandem, versions_under_test};

/// Foreign keys, one of them in a circle, and a trigger whose work must not be done twice.
const MORE_SCHEMA: &str = "
    alter table stubs add foreign key (client) references takings;
    alter table tickets add foreign key (client) references takings deferrable initially deferred;
    alter table takings add last_sale bigint references tickets;
    alter table pgbench_tellers add constraint at_a_branch foreign key (bid) references pgbench_branches;
    comment on constraint at_a_branch on pgbench_tellers is 'every teller sits somewhere';
    create table audit (id bigint generated always as identity primary key, ticket bigint not null);
    create function note_sale() returns trigger language plpgsql as
        $$ begin insert into audit (ticket) values (new.id); return null; end $$;
    create trigger note_sale after insert on tickets for each row execute function note_sale()";

const HAND_OVER: &str = "
    do $$
    declare relation regclass;
    begin
        for relation in select oid from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v') loop
            execute format('alter table %s owner to shop_owner', relation);
        end loop;
    end $$;
    alter function note_sale() owner to shop_owner";

const FOREIGN_KEYS: &str = "select count(*) from pg_constraint
    where contype = 'f' and convalidated and connamespace = 'public'::regnamespace";

#[tokio::test(flavor = "multi_thread")]
async fn a_database_moves_with_the_least_rights() {
    // Given the roles of the documentation.
    let mut stage = Stage::new(versions_under_test(), scale(5)).await;
    stage.source.execute(MORE_SCHEMA).await;
    for (cluster, database, right) in
        [(&stage.source_server, &stage.source, "replication"), (&stage.target_server, &stage.target, "")]
    {
        cluster
            .execute(&format!(
                "create role shop_owner nologin; create role pgtandem login {right} password '{PASSWORD}';
                 grant connect, create, temporary on database app to pgtandem; grant shop_owner to pgtandem;
                 grant pg_monitor to pgtandem"
            ))
            .await;
        database.execute("grant create on schema public to pgtandem, shop_owner").await;
    }
    stage.source.execute(HAND_OVER).await;
    let [from, to] = [&stage.source, &stage.target].map(|database| database.with_user("pgtandem", PASSWORD));
    stage.program = Pgtandem::new(&from, &to, "app");
    let stage = stage.configured("");
    let load = Load::start(&stage, GENTLE);
    let mut daemon = stage.daemon(&[]);
    stage.wait_until_ready(&mut daemon).await;
    assert_eq!(stage.target.query_string(FOREIGN_KEYS).await, "0");

    // When a cutover is given up, then what it brought back is gone again and following goes on.
    stage.hook_shall("refuse");
    stage.fail_to_cut_over("60s", "the hook refuses").await;
    stage.hook_is_well();
    assert_eq!(stage.target.query_string(FOREIGN_KEYS).await, "0");
    load.wait_for_sales().await;
    stage.wait_for_more().await;

    // And the next one brings everything, checked.
    finish(&stage, load, daemon).await;
    assert_eq!(stage.target.query_string(FOREIGN_KEYS).await, stage.source.query_string(FOREIGN_KEYS).await);
}
