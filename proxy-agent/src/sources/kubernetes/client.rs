//! The client of the API server: who we are, where it is, and how soon a connection counts as dead.

use std::{
    error,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _, retry::RetryPolicy},
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::{BoxError, Service, ServiceBuilder, retry::RetryLayer};

use super::collect::Server;
use crate::metrics::RestClientMetrics;

/// A connection on which nothing came for this long is probed by the kernel, as often as [`PROBES`]: client-go asks over
/// HTTP/2 after 30 s, and waits 15 s for the answer (k8s.io/apimachinery, pkg/util/net/http.go, v0.36).
const IDLE: Duration = Duration::from_secs(30);
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;
/// So long after the last sign of life from the other machine a connection is dead, also when there is something to send.
const DEAD: Duration = Duration::from_secs(45);
/// Nothing from the API server itself for this long, while its machine lives: a watch gets a bookmark about each minute
/// (k8s.io/apiserver, pkg/storage/cacher, v0.36), other requests have a minute to be answered.
const SILENT: Duration = Duration::from_secs(150);

/// Where the API server is, and who we are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// As this file says; the server may be another one.
    Kubeconfig(PathBuf, Option<String>),
    /// The pod's ServiceAccount, at the server that KUBERNETES_SERVICE_HOST and _PORT name, or at another one.
    InCluster(Option<String>),
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {}: {cause}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: Box<KubeconfigError>,
    },
    /// There is no ServiceAccount here.
    #[error("cannot reach the API server as a pod: {0}; give --kubeconfig FILE")]
    InCluster(Box<InClusterError>),
    /// `--master` is no address.
    #[error("--master {text}: {cause}; use https://ADDRESS:PORT")]
    Master {
        /// What it says.
        text: String,
        /// Why.
        cause: http::uri::InvalidUri,
    },
    /// A proxy for HTTP stands between.
    #[error(
        "the kubeconfig or HTTPS_PROXY leads to the API server by way of {0}, and this agent goes there directly only"
    )]
    Proxy(http::Uri),
    /// Its certificates or credentials cannot be used.
    #[error("cannot set up the connection to the API server at {server}: {cause}")]
    Client {
        /// Its address.
        server: String,
        /// Why.
        cause: Box<kube::Error>,
    },
}

/// A client that has sent nothing yet, and how the server is reached.
pub async fn open(access: &Access, metrics: &RestClientMetrics) -> Result<(Client, Server), Error> {
    let config = config(access).await?;
    let server = config.cluster_url.to_string();
    tracing::info!(server, "following the API server");
    let reached = Server::new(config.cluster_url.host().unwrap_or_default());
    if let Some(proxy) = config.proxy_url {
        return Err(Error::Proxy(proxy));
    }
    let client = connect(&config, metrics).map_err(|cause| Error::Client {
        server,
        cause: Box::new(cause),
    })?;
    Ok((client, reached))
}

async fn config(access: &Access) -> Result<Config, Error> {
    let (mut config, master) = match access {
        Access::Kubeconfig(path, master) => {
            let failed = |cause| Error::Kubeconfig {
                path: path.clone(),
                cause: Box::new(cause),
            };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(file, &options).await;
            (config.map_err(failed)?, master)
        }
        Access::InCluster(master) => {
            let config = Config::incluster_env();
            let config = config.map_err(|cause| Error::InCluster(Box::new(cause)))?;
            (config, master)
        }
    };
    if config.accept_invalid_certs {
        // Nobody is trusted more than others: without any, the system's would be asked for, which an image need not have.
        config.root_cert.get_or_insert_default();
    }
    if let Some(master) = master {
        config.cluster_url = master.parse().map_err(|cause| Error::Master {
            text: master.clone(),
            cause,
        })?;
    }
    Ok(config)
}

/// kube's own client, but for the connections, which end when the server is gone, and for what is counted.
fn connect(config: &Config, metrics: &RestClientMetrics) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_keepalive(Some(IDLE));
    tcp.set_keepalive_interval(Some(PROBE_INTERVAL));
    tcp.set_keepalive_retries(Some(PROBES));
    tcp.set_tcp_user_timeout(Some(DEAD));
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let mut connector = TimeoutConnector::new(tls);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(Some(SILENT));
    connector.set_write_timeout(config.write_timeout);
    connector.set_reset_reader_on_write(true);
    let retries = RetryLayer::new(RetryPolicy::server_retry());
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(retries)
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(Counted {
            inner: legacy::Builder::new(TokioExecutor::new()).build(connector),
            metrics: metrics.clone(),
        });
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// Counts every request and how it was answered.
#[derive(Clone, Debug)]
struct Counted<S> {
    inner: S,
    metrics: RestClientMetrics,
}

impl<S, B> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.method().clone();
        let uri = request.uri();
        let host = uri.authority().map(ToString::to_string).unwrap_or_default();
        let mut words = uri.query().unwrap_or_default().split('&');
        let is_watch = words.any(|word| word == "watch=true");
        let metrics = self.metrics.clone();
        let started = Instant::now();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = answer.as_ref().ok().map(|answer| answer.status().as_u16());
            let elapsed = (!is_watch).then(|| started.elapsed());
            metrics.answered(method.as_str(), &host, code, elapsed);
            answer
        })
    }
}

/// An error with all its causes, each once.
pub fn causes(error: &dyn error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(of) = cause {
        let more = of.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = of.source();
    }
    text
}
