import de.bwaldvogel.mongo.MongoServer;
import de.bwaldvogel.mongo.MongoVersion;
import de.bwaldvogel.mongo.backend.memory.MemoryBackend;
import java.util.List;

/**
 * mongo-java-server in memory, with its oplog: its change streams name no place to resume from, which today's drivers ask
 * for. Its one argument is the port on 127.0.0.1.
 */
class Main {
    /** What today's drivers ask for; the server itself knows names up to 5.0, and gives them the wire version of 4.2. */
    record Version(List<Integer> getVersionArray, int getWireVersion) implements MongoVersion {}

    public static void main(String[] arguments) throws InterruptedException {
        MongoServer server = new MongoServer(new MemoryBackend().version(new Version(List.of(5, 0, 0), 13)));
        server.enableOplog();
        server.bind("127.0.0.1", Integer.parseInt(arguments[0]));
        Thread.currentThread().join();
    }
}
