//! TLS as libpq's `sslmode`, `sslrootcert`, `sslcert`, `sslkey` and `channel_binding` ask for it.
