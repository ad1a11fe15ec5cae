//! Connection strings against real servers: TLS modes, ways to log in, and what is said when it fails.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use pgtandem::postgres::server::REMOVED_FROM_CHILDREN;
use pgtandem::postgres::{Ambient, ConnInfo, Server, Session, Side};
use pgtandem::{Class, Error};
use rcgen::{CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::harness::{Cluster, PATIENCE, client_program, versions_under_test, wait_until};

/// A source on a machine where nobody has a home.
fn server(url: &str) -> Server {
    Server::new(Side::Source, ConnInfo::parse(url, &Ambient::default()).unwrap(), "app").unwrap()
}

async fn refusal(url: &str) -> Error {
    server(url).connect("test").await.err().unwrap_or_else(|| panic!("connected"))
}

/// The role and whether the server says that the session is encrypted.
async fn who(session: &Session) -> (String, bool) {
    let sql = "SELECT current_user::text, ssl FROM pg_catalog.pg_stat_ssl WHERE pid = pg_catalog.pg_backend_pid()";
    let row = session.query_one(sql, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

async fn connects(url: &str, encrypted: bool) {
    let server = server(url);
    let session = server.connect("test").await.unwrap_or_else(|error| panic!("{url}: {error}"));
    assert_eq!(who(&session).await.1, encrypted, "{url}");
    let (stream, end_point, _) = server.open_stream().await.unwrap();
    assert_eq!((stream.is_encrypted(), end_point.is_some()), (encrypted, encrypted), "{url}");
}

const TRUST: &str = "host all all 127.0.0.1/32 trust";

#[tokio::test]
async fn every_sslmode_does_what_libpq_does() {
    let cluster = Cluster::builder(versions_under_test().0).tls().hba(TRUST).start().await;
    let (port, ca) = (cluster.port(), cluster.tls().ca.display().to_string());
    let stranger = stranger(&cluster);
    let url = |rest: &str| format!("host=localhost port={port} user=postgres {rest}");

    connects(&url("sslmode=disable"), false).await;
    connects(&url("sslmode=allow"), false).await;
    connects(&url("sslmode=prefer"), true).await;
    connects(&url("sslmode=require"), true).await;
    connects(&url(&format!("sslmode=require sslrootcert={ca}")), true).await;
    connects(&url(&format!("sslmode=verify-ca sslrootcert={ca}")), true).await;
    connects(&url(&format!("sslmode=verify-full sslrootcert={ca}")), true).await;
    connects(&url("sslmode=require ssl_max_protocol_version=TLSv1.2"), true).await;
    // The certificate is for localhost: hostaddr does not change the name.
    connects(
        &format!("host=localhost hostaddr=127.0.0.1 port={port} user=postgres sslmode=verify-full sslrootcert={ca}"),
        true,
    )
    .await;

    for mode in ["require", "verify-ca", "verify-full"] {
        let error = refusal(&url(&format!("sslmode={mode} sslrootcert={stranger}"))).await;
        assert_eq!((error.code(), error.class()), ("tls_unknown_authority", Class::Wait), "{mode}: {error}");
        assert!(error.hint_text().unwrap().contains("sslrootcert"));
    }
    // As libpq: prefer goes on without TLS.
    connects(&url(&format!("sslmode=prefer sslrootcert={stranger}")), false).await;
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_tls_is_required() {
    let cluster = Cluster::builder(versions_under_test().0).hba(TRUST).start().await;
    let url = |mode: &str| format!("postgresql://postgres@localhost:{}/postgres?sslmode={mode}", cluster.port());
    connects(&url("prefer"), false).await;
    let error = refusal(&url("require")).await;
    assert_eq!((error.code(), error.class().exit_code()), ("tls_not_supported", 3));
    assert!(error.to_string().starts_with("connecting to the source (localhost:"), "{error}");
}

/// An authority that signed nothing here.
fn stranger(cluster: &Cluster) -> String {
    let file = cluster.data().with_file_name("stranger.pem");
    fs::write(&file, authority("a stranger").pem()).unwrap();
    file.display().to_string()
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Gives the server another certificate, which `shape` makes out, and writes its authority to `ca`.
async fn recertify(cluster: &Cluster, ca: &Path, shape: impl FnOnce(&mut CertificateParams)) {
    let issuer = authority("authority of the test");
    fs::write(ca, issuer.pem()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "localhost");
    shape(&mut params);
    let key = KeyPair::generate().unwrap();
    let files = cluster.tls().clone();
    // The files keep their owner and mode.
    fs::write(&files.server_certificate, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(&files.server_key, key.serialize_pem()).unwrap();
    // Without authorities, any certificate will do for asking; its digest says when the new one is served.
    let server = server(&format!("host=localhost port={} user=postgres sslmode=require", cluster.port()));
    let before = server.open_stream().await.unwrap().1;
    server.connect("test").await.unwrap().batch_execute("SELECT pg_reload_conf()").await.unwrap();
    wait_until("the new certificate is served", PATIENCE, async || server.open_stream().await.unwrap().1 != before)
        .await;
}

#[tokio::test]
async fn a_bad_certificate_is_named_for_what_is_wrong_with_it() {
    let cluster = Cluster::builder(versions_under_test().0).tls().hba(TRUST).start().await;
    let ca = cluster.data().with_file_name("own-ca.pem");
    let url = |mode: &str| {
        format!("host=localhost port={} user=postgres sslmode={mode} sslrootcert={}", cluster.port(), ca.display())
    };
    let (full, chain) = (url("verify-full"), url("verify-ca"));

    // Without any subjectAltName the common name counts, as with libpq.
    recertify(&cluster, &ca, |_| {}).await;
    connects(&full, true).await;

    let elsewhere = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("elsewhere.example".try_into().unwrap())];
    };
    recertify(&cluster, &ca, elsewhere).await;
    let error = refusal(&full).await;
    assert_eq!(error.code(), "tls_name_mismatch", "{error}");
    connects(&chain, true).await;

    recertify(&cluster, &ca, |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1)).await;
    for url in [&full, &chain] {
        let error = refusal(url).await;
        assert_eq!(error.code(), "tls_certificate_expired", "{error}");
    }
}

#[tokio::test]
async fn every_way_to_log_in_works_and_binds_to_tls_where_asked() {
    let hba = "hostssl all scram 127.0.0.1/32 scram-sha-256\n\
               host all md5 127.0.0.1/32 md5\n\
               host all clear 127.0.0.1/32 password\n\
               hostnossl all plain 127.0.0.1/32 trust\n\
               hostssl all postgres 127.0.0.1/32 cert";
    let cluster = Cluster::builder(15).tls().hba(hba).start().await;
    let (port, tls) = (cluster.port(), cluster.tls().clone());
    let certificate = format!("sslcert={} sslkey={}", tls.client_certificate.display(), tls.client_key.display());
    let url = |rest: &str| format!("host=localhost port={port} dbname=postgres {rest}");

    let admin = server(&url(&format!("user=postgres {certificate}"))).connect("test").await.unwrap();
    assert_eq!(who(&admin).await, ("postgres".to_owned(), true));
    admin
        .batch_execute(
            "CREATE ROLE scram LOGIN PASSWORD 'p@ss/w:rd''\\ %20'; CREATE ROLE clear LOGIN PASSWORD 'c';
             CREATE ROLE plain LOGIN; SET password_encryption = md5; CREATE ROLE md5 LOGIN PASSWORD 'm'",
        )
        .await
        .unwrap();

    let scram = format!("postgresql://scram:p%40ss%2Fw%3Ard%27%5C%20%2520@localhost:{port}/postgres");
    connects(&scram, true).await;
    connects(&format!("{scram}?channel_binding=require"), true).await;
    connects(&format!("{scram}?channel_binding=disable&sslmode=require"), true).await;
    connects(&url("user=md5 password=m sslmode=disable"), false).await;
    connects(&url("user=clear password=c"), true).await;
    // pg_hba.conf refuses it over TLS; prefer then tries without.
    connects(&url("user=plain"), false).await;

    for (rest, code) in [
        ("user=md5 password=m channel_binding=require", "authentication_refused"),
        ("user=scram password=tOpS3cret", "invalid_password"),
        ("user=scram", "password_missing"),
        ("user=scram password=tOpS3cret sslmode=disable", "invalid_authorization"),
        ("user=plain sslmode=require", "invalid_authorization"),
        ("user=postgres", "invalid_authorization"),
    ] {
        let error = refusal(&url(rest)).await;
        assert_eq!((error.code(), error.class()), (code, Class::Wait), "{rest}: {error}");
        assert!(!format!("{error} {error:?}").contains("tOpS3cret"), "{error:?}");
    }
}

#[tokio::test]
async fn the_password_file_is_read_at_each_connection_unless_others_can_read_it() {
    let cluster = Cluster::start(versions_under_test().0).await;
    cluster.execute("CREATE ROLE app LOGIN PASSWORD 'one:two'").await;
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join(".pgpass");
    let ambient = Ambient { user: Some("app".into()), home: Some(home.path().into()), passfile: None };
    let text = format!("host=127.0.0.1 port={} dbname=postgres", cluster.port());
    let server = Server::new(Side::Target, ConnInfo::parse(&text, &ambient).unwrap(), "app").unwrap();
    let refused = async || server.connect("test").await.err().unwrap();

    assert_eq!(refused().await.code(), "password_missing");
    fs::write(&file, format!("# ours\n127.0.0.1:{}:postgres:app:one\\:two\n", cluster.port())).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(refused().await.hint_text().unwrap().contains("chmod 0600"));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    server.connect("test").await.unwrap();

    cluster.execute("ALTER ROLE app PASSWORD 'rotated'").await;
    assert_eq!(refused().await.code(), "invalid_password");
    fs::write(&file, "*:*:*:*:rotated\n").unwrap();
    server.connect("test").await.unwrap();
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_says_why() {
    let cluster = Cluster::start(versions_under_test().0).await;
    let refused = refusal("postgresql://u@127.0.0.1:1/d").await;
    assert_eq!((refused.code(), refused.class().exit_code()), ("connection_refused", 3));
    assert!(refused.to_string().contains("source (127.0.0.1:1, database \"d\", user \"u\")"), "{refused}");
    assert_eq!(refusal("postgresql://u@no-such-host.invalid/d").await.code(), "host_not_found");
    assert_eq!(refusal("host=/nowhere user=u").await.code(), "socket_not_found");
    assert_eq!(refusal(&cluster.url("none", "postgres")).await.code(), "database_not_found");

    // A host that accepts and then says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().map(|address| (address.port(), silent)).unwrap();
    let error = refusal(&format!("host=127.0.0.1 port={} user=u connect_timeout=2", silent.0)).await;
    assert_eq!((error.code(), error.class()), ("connect_timeout", Class::Retry), "{error}");
    // The next host of the list is tried, and remembered.
    let list = cluster.url("postgres", "postgres").replace("@", &format!("@127.0.0.1:{},", silent.0))
        + "?connect_timeout=2&target_session_attrs=primary";
    let server = server(&list);
    assert_eq!(server.connect("test").await.unwrap().host().port, cluster.port());
    assert_eq!(server.open_stream().await.unwrap().2.port, cluster.port());
    assert_eq!(refusal(&list.replace("primary", "standby")).await.code(), "session_attrs");
}

#[tokio::test]
async fn a_session_is_pinned_named_told_and_gone_when_dropped() {
    let cluster = Cluster::start(versions_under_test().0).await;
    cluster
        .execute(
            "ALTER ROLE postgres SET DateStyle = 'SQL, DMY'; ALTER ROLE postgres SET search_path = evil;
             ALTER ROLE postgres SET default_transaction_read_only = on; ALTER ROLE postgres SET statement_timeout = 1",
        )
        .await;
    let server = server(&cluster.url("postgres", "postgres"));
    let mut session = server.connect("control").await.unwrap();
    let row = session
        .query_one(
            "SELECT '2024-02-01'::date::text, current_setting('search_path'), current_setting('transaction_read_only'),
                    current_setting('statement_timeout'), current_setting('application_name'), pg_backend_pid()",
            &[],
        )
        .await
        .unwrap();
    let text: Vec<String> = (0..5).map(|at| row.get(at)).collect();
    assert_eq!(text, ["2024-02-01", "\"\"", "off", "0", "pgtandem app control"]);
    let pid: i32 = row.get(5);

    session.batch_execute("LISTEN told; NOTIFY told, 'hello'").await.unwrap();
    assert_eq!(session.notification().await.unwrap().payload(), "hello");

    let canceller = session.canceller();
    let (slept, ()) = tokio::join!(session.batch_execute("SELECT pg_sleep(600)"), async {
        let active = format!("SELECT FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'");
        let watcher = server.connect("watch").await.unwrap();
        wait_until("the session sleeps", PATIENCE, async || !watcher.query(&active, &[]).await.unwrap().is_empty())
            .await;
        canceller.cancel().await.unwrap();
    });
    assert_eq!(Error::from(slept.unwrap_err()).sqlstate(), Some("57014"));

    drop(session);
    let watcher = server.connect("watch").await.unwrap();
    let alive = format!("SELECT FROM pg_stat_activity WHERE pid = {pid}");
    wait_until("the backend is gone", PATIENCE, async || watcher.query(&alive, &[]).await.unwrap().is_empty()).await;
    assert!(!cluster.log().contains("unexpected EOF"), "{}", cluster.log());
}

#[tokio::test]
async fn children_reach_the_same_server_and_see_nothing_of_our_own_variables() {
    let cluster = Cluster::builder(versions_under_test().0).tls().start().await;
    let server = server(&cluster.database("postgres").url());
    let mut psql = tokio::process::Command::new(client_program(18, "psql"));
    // What the one who started us may have set.
    psql.env("PGHOST", "nowhere.invalid")
        .env("PGSERVICE", "none")
        .env("PGOPTIONS", "-c DateStyle=German")
        .env("PGSSLCRL", "/none");
    for name in REMOVED_FROM_CHILDREN {
        psql.env_remove(name);
    }
    psql.envs(server.child_environment("dump"));
    let sql = "SELECT current_user, current_setting('application_name'), ssl, current_setting('DateStyle'),
                      current_setting('default_transaction_read_only')
               FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    psql.args(["-XAtc", sql]).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(60), psql.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.trim(), "postgres|pgtandem app dump|t|ISO, MDY|off", "{}", String::from_utf8_lossy(&output.stderr));
}
